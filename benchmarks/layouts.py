"""The contenders of convolutions: fastcv channels-last, torch in both memory formats."""

from __future__ import annotations

from collections.abc import Callable

import torch


def in_format(function: Callable, memory_format: torch.memory_format) -> Callable:
    """Times ``function`` with input and weight in a memory format."""

    def prepare(x, weight, *rest):
        x, weight = (t.contiguous(memory_format=memory_format) for t in (x, weight))
        return lambda: function(x, weight, *rest)

    return prepare


def contenders(ours: Callable, theirs: Callable) -> dict[str, Callable]:
    """The input comes channels-last; fastcv lays the weight out itself."""
    return {
        "fastcv": lambda *arguments: lambda: ours(*arguments),
        "torch, channels-last": in_format(theirs, torch.channels_last),
        "torch, contiguous": in_format(theirs, torch.contiguous_format),
    }
