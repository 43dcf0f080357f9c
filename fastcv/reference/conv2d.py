"""Convolution with its epilogue in plain PyTorch: the specification of ``csrc/conv2d``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda x, slope: x,
    "relu": lambda x, slope: x.relu(),
    "relu6": lambda x, slope: F.relu6(x),
    "leaky_relu": lambda x, slope: torch.where(x > 0, x, slope * x),
    "silu": lambda x, slope: F.silu(x),
    "hardswish": lambda x, slope: F.hardswish(x),
    "hardsigmoid": lambda x, slope: F.relu6(x + 3) / 6,  # F.hardsigmoid has no second derivative
    "sigmoid": lambda x, slope: x.sigmoid(),
    "gelu": lambda x, slope: F.gelu(x),
    "tanh": lambda x, slope: x.tanh(),
}


def epilogue(result: Tensor, residual: Tensor | None, activation: str, slope: float, input: Tensor) -> Tensor:
    """``activation(result + residual)``, in the memory format of ``input``."""
    if residual is not None:
        if residual.shape != result.shape:
            raise RuntimeError(
                f"residual: expected the output's shape {list(result.shape)}, got {list(residual.shape)}"
            )
        result = result + residual
    memory_format = torch._prims_common.suggest_memory_format(input)
    return ACTIVATIONS[activation](result, slope).contiguous(memory_format=memory_format)


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
    with torch.autocast(input.device.type, enabled=False):
        result = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        return epilogue(result, residual, activation, slope, input)


def conv2d_prepare(
    weight: Tensor, groups: int, stride: list[int], padding: list[int], dilation: list[int], kernel: str
) -> Tensor:
    """Nothing: :func:`conv2d` reads the weights themselves."""
    return weight.new_empty(0)


def conv2d_kernel(
    input: Tensor, weight: Tensor, groups: int, stride: list[int], padding: list[int], dilation: list[int]
) -> int:
    """The first, whichever: there is one way here."""
    return 0


def conv2d_input_gradient(grad: Tensor, weight: Tensor, padding: list[int], kernel: str) -> Tensor:
    """The gradient of the input of a convolution with stride 1, which is the transposed convolution."""
    result = F.conv_transpose2d(grad, weight, padding=padding)
    return result.contiguous(memory_format=torch._prims_common.suggest_memory_format(grad))
