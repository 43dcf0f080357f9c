"""Gradients of a convolution's weights, which are also those of the transposed convolution with the roles of input and
gradient exchanged.

They are a matrix product over all pixels (_weight_gemm.py, with bytes, operations and floors) or, of groups of one
channel, run without the matrix unit (_weight_depthwise.py). The gradient of the input is conv_transpose2d, and that of
the transposed convolution conv2d.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..reference.convolution_gradients import check_arguments
from ._convolution import MOST, TYPES, Plan, allows_tf32, check, check_geometry, is_depthwise, strides_of
from ._launch import Variant
from ._weight_depthwise import weight_depthwise
from ._weight_gemm import weight_gemm
from ._weight_gradient import WeightProblem, finish_weights_launch


def conv2d_weight_gradient(
    grad: Tensor,
    input: Tensor,
    size: list[int],
    groups: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    channels_last: bool,
) -> Tensor:
    check_arguments(grad, input, size, groups, stride, padding, dilation)
    check_geometry(groups, stride, padding, dilation, size)
    check(input.dtype in TYPES, f"input: expected float32, float64, float16 or bfloat16, got {input.dtype}")
    check(max(*grad.shape, *input.shape, math.prod(size)) <= MOST, "grad, input: expected sides below 2^31")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (grad.shape[1], input.shape[1] // groups, *size)
    out = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format)
    if not input.shape[0]:
        return out.zero_()
    if out.numel():
        problem = WeightProblem(
            input.dtype, tuple(input.shape), strides_of(input), tuple(grad.shape), strides_of(grad), tuple(size),
            groups, tuple(stride), tuple(padding), tuple(dilation), channels_last, allows_tf32(input),
        )  # fmt: skip
        plan(problem).run(input, grad=grad, out=out)
    return out


@functools.lru_cache(maxsize=4096)
def plan(problem: WeightProblem) -> Plan:
    few = is_depthwise(problem.channels, problem.outputs)
    return weight_depthwise(problem) if few else weight_gemm(problem)


def _example(
    dtype: torch.dtype, images: int, channels: int, height: int, width: int, outputs: int, size: int, *,
    stride: int = 1, padding: int = 0, groups: int = 1, channels_last: bool = True,
) -> WeightProblem:  # fmt: skip
    """With dense maps."""

    def strides(c: int, h: int, w: int) -> tuple[int, ...]:
        return (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)

    sides = [(n + 2 * padding - size) // stride + 1 for n in (height, width)]
    return WeightProblem(
        dtype, (images, channels, height, width), strides(channels, height, width), (images, outputs, *sides),
        strides(outputs, *sides), (size, size), groups, (stride, stride), (padding, padding), (1, 1), channels_last,
        False,
    )  # fmt: skip


_EXAMPLES = {
    "3x3, 256 to 256, 8 images of 50 x 68; 41 us of products": _example(
        torch.bfloat16, 8, 256, 50, 68, 256, 3, padding=1
    ),
    "1x1, 256 to 64, 32 images of 56 x 56; 64 MB, 15 us": _example(torch.float16, 32, 256, 56, 56, 64, 1),
    "7x7, stride 2, 3 to 64, 32 images of 224 x 224; 61 MB, 14 us": _example(
        torch.bfloat16, 32, 3, 224, 224, 64, 7, stride=2, padding=3
    ),
    "3x3, 128 to 128, 32 images of 28 x 28, contiguous; 13 MB, 3 us, 7.4 GFLOP 9 us": _example(
        torch.float16, 32, 128, 28, 28, 128, 3, padding=1, channels_last=False
    ),
    "3x3, 64 to 64, 8 images of 56 x 56; 14 us of three products each": _example(
        torch.float32, 8, 64, 56, 56, 64, 3, padding=1
    ),
    "3x3, 128 to 128 in 32 groups, 32 images of 56 x 56; 51 MB, 12 us": _example(
        torch.bfloat16, 32, 128, 56, 56, 128, 3, padding=1, groups=32
    ),
    "float64, 3x3, 64 to 64, 56 x 56": _example(torch.float64, 1, 64, 56, 56, 64, 3, padding=1),
    "depthwise 3x3, 32 images, 144, 56 x 56; 58 MB, 13 us": _example(
        torch.float16, 32, 144, 56, 56, 144, 3, padding=1, groups=144
    ),
    "depthwise 5x5, contiguous, 8 images, 72, 56 x 56; 14 MB, 3 us": _example(
        torch.float32, 8, 72, 56, 56, 72, 5, padding=2, groups=72, channels_last=False
    ),
}
_SUMS = {  # an example, the parts of its sums, and their channels
    "3x3, 256 to 256: 7 parts; 18 MB, 4 us": (next(iter(_EXAMPLES.values())), 7, 256),
    "depthwise 3x3, 144: 175 parts; 1 MB": (_example(torch.float16, 32, 144, 56, 56, 144, 3, groups=144), 175, 144),
}


def _variant(p: WeightProblem, note: str) -> Variant:
    launch = plan(p).launches[0]
    # Of float64, and of fewer than 64 rows, the newer matrix instructions have none.
    matrix = p.dtype != torch.float64 and launch.constants.get("BLOCK_M", 0) >= 64
    return launch.variant(p.dtype, note, matrix)


VARIANTS = [_variant(p, note) for note, p in _EXAMPLES.items()]
VARIANTS += [finish_weights_launch(p, *rest).variant(p.dtype, note) for note, (p, *rest) in _SUMS.items()]
