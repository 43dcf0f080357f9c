"""Gradients of a convolution's weights in plain PyTorch. Those of its input are a transposed convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check_arguments(
    grad: Tensor, input: Tensor, size: list[int], groups: int, stride: list[int], padding: list[int],
    dilation: list[int],
) -> list[int]:  # fmt: skip
    """Raises where ``grad`` is not of an output of ``input``; else the rows and columns that the input has beyond the
    last taps, as output padding of the transposed convolution."""
    if grad.dim() != 4 or input.dim() != 4 or grad.shape[0] != input.shape[0]:
        raise RuntimeError(
            "grad, input: expected shapes [N, K, OH, OW] and [N, C, H, W] with one N, "
            f"got {list(grad.shape)} and {list(input.shape)}"
        )
    if grad.dtype != input.dtype or grad.device != input.device:
        raise RuntimeError(
            f"grad: expected the type and device of input, {input.dtype} and {input.device}, "
            f"got {grad.dtype} and {grad.device}"
        )
    numbers = (*size, *stride, *dilation, *(p + 1 for p in padding))
    if [len(n) for n in (size, stride, padding, dilation)] != [2] * 4 or min(numbers) < 1:
        raise RuntimeError(
            "size, stride, padding, dilation: expected two positive numbers each, of padding zeros as well, "
            f"got {list(size)}, {list(stride)}, {list(padding)}, {list(dilation)}"
        )
    if groups < 1 or grad.shape[1] % groups or input.shape[1] % groups:
        raise RuntimeError(f"groups: expected a divisor of {grad.shape[1]} and {input.shape[1]} channels, got {groups}")
    options = zip(input.shape[2:], grad.shape[2:], size, stride, padding, dilation, strict=True)
    extra = [n - (o - 1) * s + 2 * p - d * (k - 1) - 1 for n, o, k, s, p, d in options]
    if min(grad.shape[2:]) < 1 or any(not 0 <= e < max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        raise RuntimeError(
            f"grad: expected the size of an output of a {size[0]} x {size[1]} convolution of input, "
            f"{list(input.shape)}, got {list(grad.shape)}"
        )
    return extra


def conv2d_weight_gradient(
    grad: Tensor, input: Tensor, size: list[int], groups: int, stride: list[int], padding: list[int],
    dilation: list[int], channels_last: bool,
) -> Tensor:  # fmt: skip
    """``grad`` may lack last rows and columns: an output padding of ``stride`` and more is possible where the dilation
    is larger, and is there for the transposed convolution, whose output is ``input`` here."""
    extra = check_arguments(grad, input, size, groups, stride, padding, dilation)
    rows, columns = (e // s for e, s in zip(extra, stride, strict=True))
    if rows or columns:
        grad = F.pad(grad, (0, columns, 0, rows))
    weight = input.new_empty(1).expand(grad.shape[1], input.shape[1] // groups, *size)  # its shape counts alone
    _, result, _ = torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )
    return result.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
