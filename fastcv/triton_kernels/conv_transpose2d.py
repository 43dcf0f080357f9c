"""Transposed convolution with its epilogue.

Each phase of the output (position modulo stride) is a convolution of the input with some of the taps, no zeros between
pixels are multiplied, and no two programs add to one output. The kernels are those of conv2d, where bytes and
operations are counted. 4x4, stride 2, 256 to 256 channels, 25 x 34 pixels, bfloat16: four phases of 4 taps, 1.8 GFLOP
are 2.3 us on an H200 (790 TFLOP/s), 4.3 MB 1.0 us (4.3 TB/s).

It is the gradient of conv2d's input as well, with the output padding that gives it the input's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._convolution import check, check_geometry, check_kernel, example, is_depthwise, make_problem
from .conv2d import plan, run


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    prepared: Tensor | None,
    groups: int,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    dilation: list[int],
    activation: str,
    slope: float,
    kernel: str,
) -> Tensor:
    _check(input, weight, groups, stride, padding, output_padding, dilation, kernel)
    if prepared is None:
        prepared = _laid_out(weight, groups)
    size = list(weight.shape[2:])
    options = zip(input.shape[2:], size, stride, padding, output_padding, dilation, strict=True)
    out_size = [(n - 1) * s - 2 * p + d * (k - 1) + 1 + extra for n, k, s, p, extra, d in options]
    problem = make_problem(
        input, prepared, bias, residual, weight.shape[1] * groups, size, groups, stride, padding, dilation, out_size,
        True, activation, slope,
    )  # fmt: skip
    return run(problem, input, prepared, bias, residual)


def conv_transpose2d_prepare(
    input: Tensor,
    weight: Tensor,
    groups: int,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    dilation: list[int],
    kernel: str,
) -> Tensor:
    """``[K, KH, KW, C / groups]``, for the depthwise kernel ``[KH, KW, K]``: phases take their taps from among all."""
    _check(input, weight, groups, stride, padding, output_padding, dilation, kernel)
    return _laid_out(weight, groups)


def conv_transpose2d_kernel(
    input: Tensor,
    weight: Tensor,
    groups: int,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    dilation: list[int],
) -> int:
    """Of those by name none: the shape decides."""
    return -1


def _check(input, weight, groups, stride, padding, output_padding, dilation, kernel) -> None:
    check_kernel(kernel)
    check(
        input.dim() == weight.dim() == 4 and min(weight.shape) > 0,
        "input, weight: expected shapes [N, C, H, W] and [C, K / groups, KH, KW]",
    )
    check_geometry(groups, stride, padding, dilation, weight.shape[2:])
    check(
        len(output_padding) == 2 and min(output_padding) >= 0 and max(output_padding) < 2**31,
        "output_padding: expected two numbers below 2^31",
    )
    check(min(input.shape[2:]) > 0, "input: expected pixels")
    channels = weight.shape[0]
    check(
        input.shape[1] == channels and channels % groups == 0,
        f"weight: expected [{input.shape[1]}, K / groups, KH, KW] with {input.shape[1]} a multiple of groups "
        f"({groups}), got {list(weight.shape)}",
    )


def _laid_out(weight: Tensor, groups: int) -> Tensor:
    grouped = weight.unflatten(0, (groups, -1))  # [groups, C / groups, K / groups, KH, KW]
    depthwise = is_depthwise(*grouped.shape[1:3])
    order = (3, 4, 1, 0, 2) if depthwise else (0, 2, 3, 4, 1)
    return grouped.permute(order).clone(memory_format=torch.contiguous_format).view(-1)


_EXAMPLES = {
    "4x4, stride 2, 256 to 256, 25 x 34; 2 us of products": example(
        torch.bfloat16, 1, 256, 25, 34, 256, 4, stride=2, padding=1, transposed=True
    ),
    "2x2, stride 2, 100 rois, 256 to 256, 14 x 14; 13 us of products, 50 MB are 12 us": example(
        torch.float16, 100, 256, 14, 14, 256, 2, stride=2, transposed=True
    ),
    "depthwise 4x4, stride 2, 21, 100 x 136; 6 MB, 1 us": example(
        torch.float32, 1, 21, 100, 136, 21, 4, stride=2, padding=1, groups=21, transposed=True, channels_last=False
    ),
    "gradient of the input, 3x3, 256 to 256, 8 images of 50 x 68; 41 us of products": example(
        torch.bfloat16, 8, 256, 50, 68, 256, 3, padding=1, activation="none", transposed=True
    )._replace(bias=False),
    "the same, stride 2, 128 to 128, 32 images of 56 x 56; 32 MB, 7 us, 7.4 GFLOP 9 us": example(
        torch.float16, 32, 128, 28, 28, 128, 3, stride=2, padding=1, activation="none", transposed=True
    )._replace(bias=False, out=(32, 128, 56, 56)),
}
VARIANTS = [
    launch.variant(problem.dtype, note, matrix="PRECISION" in launch.constants)
    for note, problem in _EXAMPLES.items()
    for launch in plan(problem).launches
]
