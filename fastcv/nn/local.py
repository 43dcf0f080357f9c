"""Locally connected layers: :class:`LocallyConnected2d`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._checks import pair


class LocallyConnected2d(nn.Module):
    """A convolution with weights of its own at every output pixel, :func:`fastcv.ops.conv2d_local`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as of :class:`torch.nn.Conv2d`.
        input_size: height and width of the inputs, an int or a pair.

    Parameters: ``weight`` ``[OH, OW, K, C, KH, KW]`` and ``bias`` ``[K, OH, OW]``, uniform within
    ``1 / sqrt(C * KH * KW)`` on both sides of 0 at first, as a convolution's.

    Called with ``[N, C, *input_size]``; gives ``[N, K, OH, OW]``.

    Raises:
        ValueError: a size that is no int or pair of ints, or a kernel that does not fit the padded input.

    Example:
        >>> import torch, fastcv
        >>> fastcv.nn.LocallyConnected2d(3, 8, (9, 9), 3)(torch.zeros(2, 3, 9, 9)).shape
        torch.Size([2, 8, 7, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: int | tuple[int, int],
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
    ):
        super().__init__()
        self.input_size, self.kernel_size = pair("input_size", input_size), pair("kernel_size", kernel_size)
        self.stride, self.dilation = pair("stride", stride), pair("dilation", dilation)
        self.padding = pair("padding", padding, minimum=0)
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                self.input_size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        ]
        if min(size) < 1:
            raise ValueError(f"kernel_size: expected one that fits the padded input, got {self.kernel_size}")
        self.weight = nn.Parameter(torch.empty(*size, out_channels, in_channels, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels, *size)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight[0, 0, 0].numel() ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return ops.conv2d_local(input, self.weight, self.bias, self.stride, self.padding, self.dilation)

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape[2:4]
        return (
            f"{inputs}, {outputs}, input_size={self.input_size}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}"
        )
