"""avg_pool2d: Inception and DenseNet, forward and with gradients.

torch runs in both memory formats; the ratio is to the faster one, the table has both.
"""

import torch
import torch.nn.functional as F

import fastcv
from benchmarks.harness import Case, as_test
from benchmarks.layouts import LAYOUTS, pooling_contenders

SHAPES = [  # size, kernel, stride, padding
    ("Inception 3x3/1, 1x480x14x14", (1, 480, 14, 14), 3, 1, 1),
    ("Inception v3 3x3/1, 8x192x35x35", (8, 192, 35, 35), 3, 1, 1),
    ("DenseNet 2x2, 1x128x56x56", (1, 128, 56, 56), 2),
    ("DenseNet 2x2, 16x128x56x56", (16, 128, 56, 56), 2),
    ("2x2, 1x8x8x8", (1, 8, 8, 8), 2),
]


def _case(name, size, *window, layout, gradient):
    what = ", forward and backward" if gradient else ""
    return Case(
        "avg_pool2d",
        f"{name}{what}, {layout}",
        lambda: (torch.randn(size, generator=torch.Generator().manual_seed(0)), *window),
        pooling_contenders(fastcv.ops.avg_pool2d, F.avg_pool2d, layout, gradient),
    )


CASES = [
    _case(*shape, layout=layout, gradient=gradient)
    for layout in LAYOUTS
    for shape in SHAPES
    for gradient in (False, True)
]

test_avg_pool2d = as_test(CASES)
