"""max_unpool2d: the decoders of SegNet and DeconvNet, and pooling and unpooling with gradients.

torch runs in both memory formats; the ratio is to the faster one, the table has both.
"""

import torch
import torch.nn.functional as F

import fastcv
from benchmarks.harness import Case, as_test
from benchmarks.layouts import LAYOUTS

SHAPES = {
    "SegNet 2x2, 8x64x256x256": (8, 64, 256, 256),
    "DeconvNet 2x2, 1x512x28x28": (1, 512, 28, 28),
    "2x2, 1x8x8x8": (1, 8, 8, 8),
}


def _unpool(memory_format, indices):
    def prepare(x):
        x = x.contiguous(memory_format=memory_format)
        values, flat = F.max_pool2d(x, 2, return_indices=True)
        if indices == "torch":
            return lambda: F.max_unpool2d(values, flat, 2)
        positions = fastcv.ops.max_pool2d(x, 2, return_indices=True, indices=indices)[1]
        return lambda: fastcv.ops.max_unpool2d(values, positions, 2)

    return prepare


def _there_and_back(memory_format, indices):
    def prepare(x):
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        gradient = torch.ones_like(x)

        def call():
            if indices == "torch":
                out = F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)
            else:
                out = fastcv.ops.max_unpool2d(*fastcv.ops.max_pool2d(x, 2, return_indices=True, indices=indices), 2)
            return torch.autograd.grad(out, x, gradient)

        return call

    return prepare


def _case(name, layout, what, prepare, indices):
    return Case(
        "max_unpool2d",
        f"{name}, {what}, {indices}, {layout}",
        lambda: (torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(0)),),
        {"fastcv": prepare(LAYOUTS[layout], indices)}
        | {f"torch, {other}": prepare(LAYOUTS[other], "torch") for other in LAYOUTS},
    )


CASES = [
    case
    for layout in LAYOUTS
    for name in SHAPES
    for indices in ("compact", "int64")
    for case in (
        _case(name, layout, "unpooling", _unpool, indices),
        _case(name, layout, "pooling and unpooling with backward", _there_and_back, indices),
    )
]

test_max_unpool2d = as_test(CASES)
