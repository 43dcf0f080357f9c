"""avg_pool2d and adaptive pooling: Inception, DenseNet, the heads of ResNet and VGG, spatial pyramids.

torch runs in both memory formats; the ratio is to the faster one, the table has both.
"""

import torch
import torch.nn.functional as F

import fastcv
from benchmarks.harness import Case, as_test

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}


def _pyramid(x, levels):
    return torch.cat([F.adaptive_max_pool2d(x, level).flatten(1) for level in levels], 1)


OPERATORS = {  # name -> size, arguments, torch's function
    "avg_pool2d": [
        ("Inception 3x3/1, 1x480x14x14", (1, 480, 14, 14), (3, 1, 1), F.avg_pool2d),
        ("Inception v3 3x3/1, 8x192x35x35", (8, 192, 35, 35), (3, 1, 1), F.avg_pool2d),
        ("DenseNet 2x2, 1x128x56x56", (1, 128, 56, 56), (2,), F.avg_pool2d),
        ("DenseNet 2x2, 16x128x56x56", (16, 128, 56, 56), (2,), F.avg_pool2d),
        ("2x2, 1x8x8x8", (1, 8, 8, 8), (2,), F.avg_pool2d),
    ],
    "adaptive_avg_pool2d": [
        ("ResNet-50 head, 1x2048x7x7 to 1", (1, 2048, 7, 7), (1,), F.adaptive_avg_pool2d),
        ("ResNet-50 head, 32x2048x7x7 to 1", (32, 2048, 7, 7), (1,), F.adaptive_avg_pool2d),
        ("VGG head, 1x512x14x14 to 7", (1, 512, 14, 14), (7,), F.adaptive_avg_pool2d),
        ("PSPNet, 1x2048x60x60 to 6", (1, 2048, 60, 60), (6,), F.adaptive_avg_pool2d),
    ],
    "adaptive_max_pool2d": [("1x512x13x13 to 6", (1, 512, 13, 13), (6,), F.adaptive_max_pool2d)],
    "spatial_pyramid_pool": [("4, 2, 1 of 16x256x13x13", (16, 256, 13, 13), ((4, 2, 1),), _pyramid)],
}


def _in(memory_format, function, gradient=False):
    def prepare(x, *arguments):
        x = x.contiguous(memory_format=memory_format)
        if not gradient:

            def call():
                with torch.no_grad():
                    return function(x, *arguments)

            return call
        x.requires_grad_()

        def both():
            out = function(x, *arguments)
            return torch.autograd.grad(out, x, torch.ones_like(out))

        return both

    return prepare


def _case(operator, name, size, arguments, theirs, layout, gradient):
    what = ", forward and backward" if gradient else ""
    return Case(
        operator,
        f"{name}{what}, {layout}",
        lambda: (torch.randn(size, generator=torch.Generator().manual_seed(0)), *arguments),
        {"fastcv": _in(LAYOUTS[layout], getattr(fastcv.ops, operator), gradient)}
        | {f"torch, {other}": _in(LAYOUTS[other], theirs, gradient) for other in LAYOUTS},
    )


CASES = [
    _case(operator, *shape, layout, gradient)
    for layout in LAYOUTS
    for operator, shapes in OPERATORS.items()
    for shape in shapes
    for gradient in (False, True)
]

test_avg_pool2d = as_test(CASES)
