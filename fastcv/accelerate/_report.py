"""What :func:`fastcv.accelerate` changed, what it left, and why."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Part:
    """One captured part of a model."""

    name: str
    convolutions: int
    fused: int

    def __str__(self) -> str:
        plural = "" if self.convolutions == 1 else "s"
        after = f", with {self.fused} layers after {'it' if self.convolutions == 1 else 'them'}" if self.fused else ""
        return f"{self.name or '(the model)'}: {self.convolutions} convolution{plural}{after}"


@dataclasses.dataclass
class Report:
    """Captured parts, and modules that were left alone with the reason."""

    parts: list[Part] = dataclasses.field(default_factory=list)
    left: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = [str(part) for part in self.parts]
        lines += [f"{name or '(the model)'}: left as it is, {why}" for name, why in self.left]
        return "\n".join(lines) or "nothing to accelerate was found"
