"""Contenders where the memory format matters: torch runs in both, and is compared by its faster one."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastcv
from benchmarks.harness import Case

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}


def in_format(function: Callable, memory_format: torch.memory_format) -> Callable:
    """Times ``function`` with input and weight in a memory format."""

    def prepare(x, weight, *rest):
        x, weight = (t.contiguous(memory_format=memory_format) for t in (x, weight))
        return lambda: function(x, weight, *rest)

    return prepare


def contenders(ours: Callable, theirs: Callable) -> dict[str, Callable]:
    """Of convolutions: the input comes channels-last; fastcv lays the weight out itself."""
    return {"fastcv": lambda *arguments: lambda: ours(*arguments)} | {
        f"torch, {layout}": in_format(theirs, LAYOUTS[layout]) for layout in LAYOUTS
    }


def pooling(function: Callable, layout: str, gradient: bool = False) -> Callable:
    """Times ``function`` of a map in a layout without gradients, or with the gradient of the map."""

    def prepare(x, *arguments):
        x = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_(gradient)

        def forward():
            with torch.no_grad():
                return function(x, *arguments)

        def both():
            out = function(x, *arguments)
            return torch.autograd.grad(out, x, out.detach())

        return both if gradient else forward

    return prepare


def pooling_contenders(ours: Callable, theirs: Callable, layout: str, gradient: bool = False) -> dict[str, Callable]:
    """fastcv in one layout, torch in both."""
    return {"fastcv": pooling(ours, layout, gradient)} | {
        f"torch, {other}": pooling(theirs, other, gradient) for other in LAYOUTS
    }


def pooling_cases(shapes: list[tuple]) -> list[Case]:
    """Of ``(operator, torch's function, name, size, *arguments)`` each, in both layouts, with and without gradients."""

    def case(operator, theirs, name, size, *arguments, layout, gradient):
        return Case(
            operator,
            f"{name}{', forward and backward' if gradient else ''}, {layout}",
            lambda: (torch.randn(size, generator=torch.Generator().manual_seed(0)), *arguments),
            pooling_contenders(getattr(fastcv.ops, operator), theirs, layout, gradient),
        )

    return [
        case(*shape, layout=layout, gradient=gradient)
        for layout in LAYOUTS
        for shape in shapes
        for gradient in (False, True)
    ]
