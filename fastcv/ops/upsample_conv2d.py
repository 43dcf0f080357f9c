"""Nearest-neighbour upsampling and a convolution in one, "resize-convolution": :func:`upsample_conv2d`.

An output pixel sees few different input pixels, each as often as it was repeated. So the outputs of each of the
scale x scale phases are a convolution of the small map, whose weights are sums of the given ones: 3x3 for scale 2 and a
kernel of 3x3 or 5x5. All phases are one convolution with scale^2 times the output channels, whose results are then
woven together; nothing but the result has the large size. With Winograd's convolution, whose products are those of its
outputs, the input's part of the work becomes a quarter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autocast import any_enabled, autocast
from ._autograd import needs_derivatives
from ._checks import check_floating, check_shape
from ._convolution import tracing
from ._layouts import kept_layout
from .conv2d import conv2d


def upsample_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale_factor: int = 2,
    *,
    activation: str = "none",
    negative_slope: float = 0.01,
) -> Tensor:
    """``activation(conv2d(interpolate(input, scale_factor=scale_factor), weight, bias, padding="same"))``.

    Source: Odena, Dumoulin and Olah, "Deconvolution and checkerboard artifacts", Distill 2016: upsampling followed by a
    convolution instead of a transposed convolution whose kernel overlaps unevenly.

    Args:
        input: ``[N, C, H, W]``, any floating type, contiguous or channels-last.
        weight: ``[K, C, KH, KW]``, odd sizes.
        bias: ``[K]``.
        scale_factor: times in each direction, at least 1.
        activation, negative_slope: as in :func:`fastcv.ops.conv2d`.

    Returns:
        ``[N, K, H * scale_factor, W * scale_factor]`` in the input's memory format, equal to rounding (weights are
        added before they are multiplied). Differentiable with respect to all tensors, in both modes, twice. Under
        autocast it has its type; on the CPU it is computed in float32.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or device, a kernel of even size, a factor below 1.

    Example:
        >>> import torch, fastcv
        >>> x, w = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 3, 3)
        >>> fastcv.ops.upsample_conv2d(x, w)[0, 0]
        tensor([[4., 6., 6., 4.],
                [4., 6., 6., 4.]])
    """
    if any_enabled():
        result = autocast(
            upsample_conv2d, dict(input=input, weight=weight, bias=bias), scale_factor=scale_factor,
            activation=activation, negative_slope=negative_slope,
        )  # fmt: skip
        if result is not None:
            return result
    check_floating("input", input)
    check_shape("input", input, ("N", "C", "H", "W"))
    check_floating("weight", weight)
    check_shape("weight", weight, ("K", input.shape[1], "KH", "KW"))
    if any(size % 2 == 0 for size in weight.shape[2:]):
        raise ValueError(f"weight: expected a kernel of odd sizes, got {list(weight.shape)}")
    if isinstance(scale_factor, bool) or not isinstance(scale_factor, int) or scale_factor < 1:
        raise ValueError(f"scale_factor: expected an int of at least 1, got {scale_factor!r}")
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (weight.shape[0],))
    phases = scale_factor**2
    small = conv2d(
        input, _phase_weight(weight, scale_factor), None if bias is None else bias.repeat_interleave(phases),
        padding=tuple(_reach(size, scale_factor) for size in weight.shape[2:]),
        activation=activation, negative_slope=negative_slope,
    )  # fmt: skip
    memory_format = torch._prims_common.suggest_memory_format(input)
    return F.pixel_shuffle(small, scale_factor).contiguous(memory_format=memory_format)


def _reach(size: int, scale: int) -> int:
    """Inputs on each side that outputs see."""
    return -(-(size // 2) // scale)


def _sums(size: int, scale: int, like: Tensor) -> Tensor:
    """``[scale, taps, size]``: 1 where an element of the kernel falls on a tap of a phase."""
    matrix = torch.zeros(scale, 2 * _reach(size, scale) + 1, size)
    for p in range(scale):
        for k in range(size):
            matrix[p, (p - size // 2 + k) // scale + _reach(size, scale), k] = 1
    return matrix.to(like)


def _summed(weight: Tensor, scale: int) -> Tensor:
    """``[K * scale^2, C, taps, taps]``, in the order of :func:`torch.nn.functional.pixel_shuffle`."""
    rows, columns = (_sums(size, scale, weight) for size in weight.shape[2:])
    return torch.einsum("ptk,qul,ockl->opqctu", rows, columns, weight).flatten(0, 2)


def _phase_weight(weight: Tensor, scale: int) -> Tensor:
    """:func:`_summed`; of fixed weights kept, so that what :func:`conv2d` lays out is kept as well."""
    if tracing() or needs_derivatives(weight) or weight.is_inference():
        return _summed(weight, scale)
    return kept_layout(weight, ("phases", scale), lambda weight: _summed(weight, scale))
