"""Pooling layers with torch's names and arguments. They have no parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import ops


class MaxPool2d(nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` on :func:`fastcv.ops.max_pool2d`.

    Args: those of :class:`torch.nn.MaxPool2d`, and
        indices: which ones ``return_indices`` gives, ``"int64"`` or ``"compact"``.

    Example:
        >>> import torch, fastcv
        >>> pool = fastcv.nn.MaxPool2d(2, return_indices=True, indices="compact")
        >>> values, switches = pool(torch.rand(1, 3, 7, 7))
        >>> fastcv.nn.MaxUnpool2d(2)(values, switches).shape
        torch.Size([1, 3, 7, 7])
    """

    def __init__(
        self,
        kernel_size,
        stride=None,
        padding=0,
        dilation=1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        *,
        indices: str = "int64",
    ):
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)
        self.indices = indices

    def forward(self, input: Tensor):
        return ops.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices,
            indices=self.indices,
        )  # fmt: skip

    def extra_repr(self) -> str:
        more = "" if self.indices == "int64" else f", indices={self.indices!r}"
        return super().extra_repr() + more


class MaxUnpool2d(nn.MaxUnpool2d):
    """:class:`torch.nn.MaxUnpool2d` on :func:`fastcv.ops.max_unpool2d`; takes compact indices too.

    Args: those of :class:`torch.nn.MaxUnpool2d`.

    Example:
        >>> import torch, fastcv
        >>> values, indices = torch.nn.MaxPool2d(2, return_indices=True)(torch.rand(1, 3, 8, 8))
        >>> fastcv.nn.MaxUnpool2d(2)(values, indices).shape
        torch.Size([1, 3, 8, 8])
    """

    def forward(self, input: Tensor, indices: Tensor | ops.PooledIndices, output_size=None) -> Tensor:
        return ops.max_unpool2d(input, indices, self.kernel_size, self.stride, self.padding, output_size)


class AvgPool2d(nn.AvgPool2d):
    """:class:`torch.nn.AvgPool2d` on :func:`fastcv.ops.avg_pool2d`.

    Args: those of :class:`torch.nn.AvgPool2d`.

    Example:
        >>> import torch, fastcv
        >>> fastcv.nn.AvgPool2d(3, 1, 1)(torch.ones(1, 1, 2, 2))[0, 0, 0]
        tensor([0.4444, 0.4444])
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.avg_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
            self.divisor_override,
        )  # fmt: skip


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """:class:`torch.nn.AdaptiveAvgPool2d` on :func:`fastcv.ops.adaptive_avg_pool2d`.

    Args: those of :class:`torch.nn.AdaptiveAvgPool2d`.

    Example:
        >>> import torch, fastcv
        >>> fastcv.nn.AdaptiveAvgPool2d(1)(torch.ones(2, 3, 7, 7)).shape
        torch.Size([2, 3, 1, 1])
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    """:class:`torch.nn.AdaptiveMaxPool2d` on :func:`fastcv.ops.adaptive_max_pool2d`.

    Args: those of :class:`torch.nn.AdaptiveMaxPool2d`.

    Example:
        >>> import torch, fastcv
        >>> fastcv.nn.AdaptiveMaxPool2d((2, None))(torch.ones(2, 3, 7, 5)).shape
        torch.Size([2, 3, 2, 5])
    """

    def forward(self, input: Tensor):
        return ops.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class SpatialPyramidPool2d(nn.Module):
    """:func:`fastcv.ops.spatial_pyramid_pool` as a layer: between convolutions and dense layers, for maps of any size.

    Args:
        levels: bins along each axis, one grid for each.
        mode: ``"max"`` or ``"avg"``.

    Example:
        >>> import torch, fastcv
        >>> fastcv.nn.SpatialPyramidPool2d((4, 2, 1))(torch.zeros(2, 8, 13, 9)).shape
        torch.Size([2, 168])
    """

    def __init__(self, levels: Sequence[int] = (4, 2, 1), mode: str = "max"):
        super().__init__()
        self.levels = tuple(levels)
        self.mode = mode

    def forward(self, input: Tensor) -> Tensor:
        return ops.spatial_pyramid_pool(input, self.levels, self.mode)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, mode={self.mode!r}"
