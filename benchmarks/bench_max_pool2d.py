"""max_pool2d: the pooling of VGG, ResNet, GoogLeNet and SegNet, with and without indices, and its gradient.

torch runs in both memory formats; the ratio is to the faster one, the table has both.
"""

import torch
import torch.nn.functional as F

import fastcv
from benchmarks.harness import Case, as_test
from benchmarks.layouts import LAYOUTS, pooling_contenders

SHAPES = {  # size, kernel, stride, padding
    "SegNet 2x2, 8x64x256x256": ((8, 64, 256, 256), 2, 2, 0),
    "VGG 2x2, 1x64x224x224": ((1, 64, 224, 224), 2, 2, 0),
    "ResNet stem 3x3/2, 1x64x112x112": ((1, 64, 112, 112), 3, 2, 1),
    "Inception 3x3/1, 1x480x14x14": ((1, 480, 14, 14), 3, 1, 1),
    "2x2, 1x8x8x8": ((1, 8, 8, 8), 2, 2, 0),
}


def _compact(x, *window):
    values, indices = fastcv.ops.max_pool2d(x, *window, return_indices=True, indices="compact")
    return values, indices


def _values(result, expected):
    """Indices differ in kind: compact ones are compared as torch's."""
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], fastcv.ops.PooledIndices):
        result = result[0], result[1].flat()
    torch.testing.assert_close(result, expected)


def _case(name, layout, what, ours, theirs, gradient=False):
    size, *window = SHAPES[name]

    def inputs():
        return torch.randn(size, generator=torch.Generator().manual_seed(0)), *window

    return Case(
        "max_pool2d",
        f"{name}, {what}, {layout}",
        inputs,
        pooling_contenders(ours, theirs, layout, gradient),
        agree=_values,
    )


def _torch_indices(x, *window):
    return F.max_pool2d(x, *window, return_indices=True)


def _int64(x, *window):
    return fastcv.ops.max_pool2d(x, *window, return_indices=True)


CASES = [
    case
    for layout in LAYOUTS
    for name in SHAPES
    for case in (
        _case(name, layout, "values", fastcv.ops.max_pool2d, F.max_pool2d),
        _case(name, layout, "int64 indices", _int64, _torch_indices),
        _case(name, layout, "compact indices", _compact, _torch_indices),
        _case(name, layout, "forward and backward", fastcv.ops.max_pool2d, F.max_pool2d, gradient=True),
    )
]

test_max_pool2d = as_test(CASES)
