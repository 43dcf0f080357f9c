"""Upsampling layers: :class:`Upsample` and its like, :class:`UpsampleConv2d`."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops


class Upsample(nn.Upsample):
    """:class:`torch.nn.Upsample` for maps ``[N, C, H, W]`` on :func:`fastcv.ops.interpolate`.

    Args: those of :class:`torch.nn.Upsample`; ``mode`` is ``"nearest"``, ``"bilinear"`` or ``"bed_of_nails"``.

    Example:
        >>> import torch, fastcv
        >>> fastcv.nn.Upsample(scale_factor=2, mode="bilinear")(torch.zeros(1, 3, 4, 5)).shape
        torch.Size([1, 3, 8, 10])
    """

    def forward(self, input: Tensor) -> Tensor:
        scale = self.scale_factor
        if self.recompute_scale_factor and scale is not None:  # coordinates follow from the sizes, not from the factor
            both = scale if isinstance(scale, tuple) else (scale, scale)
            size = tuple(int(n * s) for n, s in zip(input.shape[2:], both, strict=True))
            return ops.interpolate(input, size, None, self.mode, self.align_corners)
        return ops.interpolate(input, self.size, scale, self.mode, self.align_corners)


class UpsamplingNearest2d(Upsample):
    """:class:`torch.nn.UpsamplingNearest2d` on :func:`fastcv.ops.interpolate`.

    Example:
        >>> import torch, fastcv
        >>> fastcv.nn.UpsamplingNearest2d(scale_factor=2)(torch.tensor([[[[1., 2.]]]]))[0, 0]
        tensor([[1., 1., 2., 2.],
                [1., 1., 2., 2.]])
    """

    def __init__(self, size=None, scale_factor=None):
        super().__init__(size, scale_factor, mode="nearest")


class UpsamplingBilinear2d(Upsample):
    """:class:`torch.nn.UpsamplingBilinear2d`, which aligns corners, on :func:`fastcv.ops.interpolate`.

    Example:
        >>> import torch, fastcv
        >>> fastcv.nn.UpsamplingBilinear2d(size=(1, 3))(torch.tensor([[[[1., 2.]]]]))[0, 0]
        tensor([[1.0000, 1.5000, 2.0000]])
    """

    def __init__(self, size=None, scale_factor=None):
        super().__init__(size, scale_factor, mode="bilinear", align_corners=True)


class UpsampleConv2d(nn.Module):
    """Nearest-neighbour upsampling and a convolution in one, :func:`fastcv.ops.upsample_conv2d`.

    Its state dict is that of ``torch.nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)``.

    Args:
        in_channels, out_channels: of the convolution.
        kernel_size: odd, of both axes.
        scale_factor: of the upsampling, an int of at least 1.
        bias: whether there is one.

    Called with ``[N, in_channels, H, W]``; gives ``[N, out_channels, H * scale_factor, W * scale_factor]``. Errors are
    those of :func:`fastcv.ops.upsample_conv2d`, at the call.

    Example:
        >>> import torch, fastcv
        >>> fastcv.nn.UpsampleConv2d(8, 4, 3)(torch.zeros(1, 8, 5, 5)).shape
        torch.Size([1, 4, 10, 10])
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, scale_factor: int = 2, bias: bool = True
    ):
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=bias)  # torch's initial values
        self.weight, self.bias = conv.weight, conv.bias
        self.scale_factor = scale_factor

    def forward(self, input: Tensor) -> Tensor:
        return ops.upsample_conv2d(input, self.weight, self.bias, self.scale_factor)

    def extra_repr(self) -> str:
        outputs, inputs, size, _ = self.weight.shape
        tail = "" if self.bias is not None else ", bias=False"
        return f"{inputs}, {outputs}, kernel_size={size}, scale_factor={self.scale_factor}{tail}"
