"""What :func:`fastcv.accelerate` changed, what it left, and why."""

from __future__ import annotations

import dataclasses

from torch import fx

from ._program import Program

_OF_GRAPHS = ("getitem", "getattr", "size")


@dataclasses.dataclass
class Part:
    """One captured part of a model."""

    name: str
    convolutions: int = 0
    fused: int = 0  # layers that convolutions and others took up
    programs: list[Program] = dataclasses.field(default_factory=list, repr=False)
    # What stays between the programs: fastcv's operators, and what is left to torch.
    own_calls: list[str] = dataclasses.field(default_factory=list)
    torch_calls: list[str] = dataclasses.field(default_factory=list)

    def add(self, programs: list[Program], graph: fx.GraphModule) -> None:
        self.programs = programs
        self.convolutions = sum(p.convolutions for p in programs)
        self.fused = sum(p.taken for p in programs)
        for node in graph.graph.nodes:
            name = str(getattr(node.target, "__name__", node.target))
            if node.op.startswith("call_") and not name.startswith("program_") and name not in _OF_GRAPHS:
                own = str(getattr(node.target, "__module__", "")).startswith("fastcv.")
                (self.own_calls if own else self.torch_calls).append(name)

    def __str__(self) -> str:
        name = self.name or "(the model)"
        if not self.programs:
            return f"{name}: captured at its first call"

        def many(count: int, what: str) -> str:
            return f"{count} {what}{'' if count == 1 else 's'}"

        text = f"{name}: {many(len(self.programs), 'program')} with {many(self.convolutions, 'convolution')}"
        text += f", {many(self.fused, 'layer')} fused" if self.fused else ""
        places = dict.fromkeys(program.place for program in self.programs if program.place)
        text += f"; on {' and '.join(places)}" if places else ""
        text += f"; between them: {', '.join(self.own_calls)}" if self.own_calls else ""
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
