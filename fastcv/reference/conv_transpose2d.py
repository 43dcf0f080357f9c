"""Transposed convolution with its epilogue in plain PyTorch: the specification of ``csrc/conv_transpose2d``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv2d import epilogue


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
    with torch.autocast(input.device.type, enabled=False):
        result = F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
        return epilogue(result, residual, activation, slope, input)


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
    """Nothing: :func:`conv_transpose2d` reads the weights themselves."""
    return weight.new_empty(0)


def conv_transpose2d_kernel(
    input: Tensor,
    weight: Tensor,
    groups: int,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    dilation: list[int],
) -> int:
    """The first, whichever: there is one way here."""
    return 0
