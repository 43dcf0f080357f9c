"""The fused layer that captured graphs call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..nn.conv import fold_norm
from ..reference.conv2d import ACTIVATIONS


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class FusedConv(nn.Module):
    """A convolution with the norm, addition and activation after it.

    The norm is folded into the weights once, until one of the tensors changes. The layers are not registered as
    children: their parameters belong to the model.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, activation: str, slope: float):
        super().__init__()
        self.__dict__.update(conv=conv, norm=norm)
        self.activation, self.slope = activation, slope
        self._state: tuple | None = None
        self._weights: tuple[Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv, (weight, bias) = self.conv, self._folded()
        arguments = (channels_last(x), weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        if residual is None:
            return ops.conv2d(*arguments, activation=self.activation, negative_slope=self.slope)
        if self._fits(x, residual):
            return ops.conv2d(*arguments, residual=residual, activation=self.activation, negative_slope=self.slope)
        sum = ops.conv2d(*arguments) + residual
        return ACTIVATIONS[self.activation](sum, self.slope)

    def _fits(self, x: Tensor, residual: Tensor) -> bool:
        """Whether the residual has the output's shape: it need not be broadcast."""
        conv = self.conv
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                x.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True
            )
        ]
        return list(residual.shape) == [x.shape[0], conv.out_channels, *size] and residual.dtype == x.dtype

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        conv, norm = self.conv, self.norm
        if norm is None:
            return conv.weight, conv.bias
        parts = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        state = tuple(None if p is None else (p.data_ptr(), None if p.is_inference() else p._version) for p in parts)
        if state != self._state:
            with torch.inference_mode(False), torch.no_grad():
                self._weights = fold_norm(*parts, norm.eps)
            self._state = state
        return self._weights
