"""Convolution with its epilogue.

It is a matrix product (_implicit_gemm.py, with bytes, operations and floors) or, of groups of one channel, runs without
the matrix unit (_depthwise.py). Bias, residual and activation are applied to the sums in registers (_epilogue.py).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ._convolution import (
    Plan,
    Problem,
    check,
    check_geometry,
    check_kernel,
    empty_output,
    example,
    is_depthwise,
    make_problem,
)
from ._depthwise import depthwise
from ._implicit_gemm import implicit_gemm


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    prepared: Tensor | None,
    groups: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    slope: float,
    kernel: str,
) -> Tensor:
    _check_weight(weight, groups, stride, padding, dilation, kernel)
    outputs, channels, *size = weight.shape
    check(
        input.dim() == 4 and input.shape[1] == channels * groups,
        f"input: expected shape [N, {channels * groups}, H, W], got {list(input.shape)}",
    )
    if prepared is None:
        prepared = _laid_out(weight, groups).reshape(-1)  # no copy of a channels-last one
    out_size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(input.shape[2:], size, stride, padding, dilation, strict=True)
    ]
    problem = make_problem(
        input, prepared, bias, residual, outputs, size, groups, stride, padding, dilation, out_size, False, activation,
        slope,
    )  # fmt: skip
    return run(problem, input, prepared, bias, residual)


def run(problem: Problem, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Also of transposed convolutions."""
    out = empty_output(problem, input)
    if out.numel():
        bias = None if bias is None else bias.contiguous()
        plan(problem).run(input, weight=weight, bias=bias, residual=residual, out=out)
    return out


@functools.lru_cache(maxsize=4096)
def plan(problem: Problem) -> Plan:
    few = is_depthwise(problem.channels, problem.outputs)
    return depthwise(problem) if few else implicit_gemm(problem)


def conv2d_prepare(
    weight: Tensor, groups: int, stride: list[int], padding: list[int], dilation: list[int], kernel: str
) -> Tensor:
    """``[K, KH, KW, C / groups]``, which is the channels-last copy; for the depthwise kernel ``[KH, KW, K]``."""
    _check_weight(weight, groups, stride, padding, dilation, kernel)
    return _laid_out(weight, groups).clone(memory_format=torch.contiguous_format).view(-1)


def conv2d_kernel(
    input: Tensor, weight: Tensor, groups: int, stride: list[int], padding: list[int], dilation: list[int]
) -> int:
    """Of those by name none: the shape decides."""
    return -1


def _check_weight(weight, groups, stride, padding, dilation, kernel) -> None:
    check_kernel(kernel)
    check(weight.dim() == 4, "weight: expected shape [K, C / groups, KH, KW]")
    outputs, channels, *size = weight.shape
    check_geometry(groups, stride, padding, dilation, size)
    check(
        channels > 0 < outputs and outputs % groups == 0,
        f"weight: expected [K, C / groups, KH, KW] with K a multiple of groups ({groups}), got {list(weight.shape)}",
    )


def _laid_out(weight: Tensor, groups: int) -> Tensor:
    depthwise = is_depthwise(weight.shape[1], weight.shape[0] // groups)
    return weight.permute(2, 3, 0, 1) if depthwise else weight.permute(0, 2, 3, 1)


_EXAMPLES = {
    "3x3, 256 to 256, 50 x 68; 5 us of products": example(
        torch.bfloat16, 1, 256, 50, 68, 256, 3, padding=1, residual=True
    ),
    "the same for 8 images; 41 us of products": example(torch.bfloat16, 8, 256, 50, 68, 256, 3, padding=1),
    "1x1, 256 to 64, 200 x 272; 35 MB, 8 us": example(torch.float16, 1, 256, 200, 272, 64, 1, activation="silu"),
    "7x7, stride 2, 3 to 64, 800 x 1088, contiguous; 33 MB, 8 us": example(
        torch.float16, 1, 3, 800, 1088, 64, 7, stride=2, padding=3, channels_last=False
    ),
    "float32, 3x3, 256 to 256, 50 x 68; 30 us of three products each": example(
        torch.float32, 1, 256, 50, 68, 256, 3, padding=1
    ),
    "3x3, 512 to 512, 7 x 7, in parts; 5 MB of weights, 1 us": example(torch.float16, 1, 512, 7, 7, 512, 3, padding=1),
    "depthwise 3x3, 32 images, 144, 56 x 56; 58 MB, 13 us": example(
        torch.float16, 32, 144, 56, 56, 144, 3, padding=1, groups=144, activation="relu6"
    ),
    "depthwise 5x5, contiguous, 8 images, 72, 56 x 56; 14 MB, 3 us": example(
        torch.float32, 8, 72, 56, 56, 72, 5, padding=2, groups=72, channels_last=False
    ),
}
VARIANTS = [
    launch.variant(problem.dtype, note, matrix="PRECISION" in launch.constants)
    for note, problem in _EXAMPLES.items()
    for launch in plan(problem).launches
]
