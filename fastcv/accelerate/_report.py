"""What :func:`fastcv.accelerate` changed, what it left, and why."""

from __future__ import annotations

import dataclasses

from torch import fx

from ._program import Program


@dataclasses.dataclass
class Part:
    """One captured part of a model."""

    name: str
    convolutions: int = 0
    fused: int = 0  # layers that convolutions and others took up
    programs: list[Program] = dataclasses.field(default_factory=list, repr=False)
    torch_calls: list[str] = dataclasses.field(default_factory=list)  # what stays between the programs

    def add(self, programs: list[Program], graph: fx.GraphModule) -> None:
        self.programs = programs
        self.convolutions = sum(p.convolutions for p in programs)
        self.fused = sum(p.taken for p in programs)
        names = [str(getattr(n.target, "__name__", n.target)) for n in graph.graph.nodes if n.op.startswith("call_")]
        self.torch_calls = [
            n for n in names if not n.startswith("program_") and n not in ("getitem", "getattr", "size")
        ]

    def __str__(self) -> str:
        name = self.name or "(the model)"
        if not self.programs:
            return f"{name}: captured at its first call"

        def many(count: int, what: str) -> str:
            return f"{count} {what}{'' if count == 1 else 's'}"

        text = f"{name}: {many(len(self.programs), 'program')} with {many(self.convolutions, 'convolution')}"
        text += f", {many(self.fused, 'layer')} fused" if self.fused else ""
        return text + (f"; in torch: {', '.join(self.torch_calls)}" if self.torch_calls else "")


@dataclasses.dataclass
class Report:
    """Captured parts, replaced operators, and modules that were left alone with the reason."""

    parts: list[Part] = dataclasses.field(default_factory=list)
    left: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    operators: list[str] = dataclasses.field(default_factory=list)  # of detection, where they were replaced

    def __str__(self) -> str:
        lines = [str(part) for part in self.parts] + self.operators
        lines += [f"{name or '(the model)'}: left as it is, {why}" for name, why in self.left]
        return "\n".join(lines) or "nothing to accelerate was found"
