"""Whole models on a GPU: ``make bench-gpu`` (with ``FASTCV_TRITON=plan``, ``python -m benchmarks --device cuda``).

As they are in float32 (without TF32), compiled by torch, and accelerated; and in bfloat16, with graphs where a
contender has them. Models have random weights from a fixed seed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastcv
from benchmarks import models
from benchmarks.harness import Case, Thunk

torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True

Input = Tensor | list[Tensor]
Prepare = Callable[[nn.Module, Input], Thunk]


def _contender(
    change: Callable[[nn.Module], nn.Module], autocast: bool = False, channels_last: bool = False
) -> Prepare:
    """A copy of the model on the device of its inputs, as ``change`` makes it."""

    def prepare(model: nn.Module, inputs: Input) -> Thunk:
        device = (inputs[0] if isinstance(inputs, list) else inputs).device
        layout = torch.channels_last if channels_last else torch.preserve_format
        model = change(copy.deepcopy(model).to(device=device, memory_format=layout))
        if channels_last and isinstance(inputs, Tensor):
            inputs = inputs.contiguous(memory_format=layout)

        def call():
            types = torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
            with torch.inference_mode(), types:
                return model(inputs)

        return call

    return prepare


def _compiled(**options) -> Callable[[nn.Module], nn.Module]:
    """The model, or of a detector what has no decisions in it."""

    def change(model: nn.Module) -> nn.Module:
        (getattr(model, "backbone", model)).compile(**options)
        return model

    return change


FLOAT32 = {
    "fastcv": _contender(fastcv.accelerate),
    "torch": _contender(lambda model: model),
    "torch, channels-last": _contender(lambda model: model, channels_last=True),
    "torch.compile": _contender(_compiled(), channels_last=True),
}
BFLOAT16 = {
    "fastcv": _contender(lambda model: fastcv.accelerate(model, dtype=torch.bfloat16, graphs=True)),
    "torch, autocast": _contender(lambda model: model, autocast=True, channels_last=True),
    "torch.compile, graphs": _contender(_compiled(mode="reduce-overhead"), autocast=True, channels_last=True),
    "fastcv, no graphs": _contender(lambda model: fastcv.accelerate(model, dtype=torch.bfloat16)),
}


def _same_scores(tolerance: float):
    def agree(result: Tensor, expected: Tensor) -> None:
        assert (result.float() - expected.float()).abs().max() <= tolerance * expected.abs().max()

    return agree


def _same_detections(least: float):
    """The share of detections that have their like: the others lie on the edge of a threshold."""

    def agree(result: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
        ours, theirs = result[0], expected[0]
        near = (ours["boxes"][:, None].float() - theirs["boxes"].float()).abs().amax(2) < 4
        near &= ours["labels"][:, None] == theirs["labels"]
        assert near.any(0).float().mean() >= least, "too many detections have no like"

    return agree


def _inputs(name: str, batch: int) -> tuple[nn.Module, Input]:
    model, x = models.build(name)
    return model, x if isinstance(x, list) else x.expand(batch, -1, -1, -1).contiguous()


def _case(name: str, batch: int, dtype: str, agree) -> Case:
    contenders = {"float32": FLOAT32, "bfloat16": BFLOAT16}[dtype]
    many = f"{batch} image{'' if batch == 1 else 's'}"
    return Case("accelerate", f"{name}, {many}, {dtype}", lambda: _inputs(name, batch), contenders, agree=agree)


CASES = [
    _case(name, batch, dtype, _same_scores(tolerance))
    for name in ("resnet50", "mobilenet_v2")
    for batch in (1, 32)
    for dtype, tolerance in (("float32", 1e-3), ("bfloat16", 0.1))
] + [
    _case(models.DETECTOR, 1, dtype, _same_detections(least)) for dtype, least in (("float32", 0.95), ("bfloat16", 0.5))
]
