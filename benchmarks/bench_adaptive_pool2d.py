"""Adaptive pooling and spatial pyramids: the heads of ResNet and VGG, PSPNet, SPPNet; forward and with gradients.

torch runs in both memory formats; the ratio is to the faster one, the table has both.
"""

import torch
import torch.nn.functional as F

import fastcv
from benchmarks.harness import Case, as_test
from benchmarks.layouts import LAYOUTS, pooling_contenders


def _pyramid(x, levels):
    return torch.cat([F.adaptive_max_pool2d(x, level).flatten(1) for level in levels], 1)


SHAPES = [  # operator, torch's function, name, size, output
    ("adaptive_avg_pool2d", F.adaptive_avg_pool2d, "ResNet-50 head, 1x2048x7x7 to 1", (1, 2048, 7, 7), 1),
    ("adaptive_avg_pool2d", F.adaptive_avg_pool2d, "ResNet-50 head, 32x2048x7x7 to 1", (32, 2048, 7, 7), 1),
    ("adaptive_avg_pool2d", F.adaptive_avg_pool2d, "VGG head, 1x512x14x14 to 7", (1, 512, 14, 14), 7),
    ("adaptive_avg_pool2d", F.adaptive_avg_pool2d, "PSPNet, 1x2048x60x60 to 6", (1, 2048, 60, 60), 6),
    ("adaptive_max_pool2d", F.adaptive_max_pool2d, "1x512x13x13 to 6", (1, 512, 13, 13), 6),
    ("spatial_pyramid_pool", _pyramid, "4, 2, 1 of 16x256x13x13", (16, 256, 13, 13), (4, 2, 1)),
]


def _case(operator, theirs, name, size, output, *, layout, gradient):
    what = ", forward and backward" if gradient else ""
    return Case(
        operator,
        f"{name}{what}, {layout}",
        lambda: (torch.randn(size, generator=torch.Generator().manual_seed(0)), output),
        pooling_contenders(getattr(fastcv.ops, operator), theirs, layout, gradient),
    )


CASES = [
    _case(*shape, layout=layout, gradient=gradient)
    for layout in LAYOUTS
    for shape in SHAPES
    for gradient in (False, True)
]

test_adaptive_pool2d = as_test(CASES)
