"""Position-sensitive RoI pooling (:func:`ps_roi_pool`), and its layer.

Defined on every path alike:

* corners are scaled and rounded half away from zero; the second corner's pixels do not belong to the region, nor does
  the last row or column of the map (R-FCN's own rounding, which torchvision shares); a region is at least a pixel;
* a bin without a pixel is 0, as is every bin of a region with an infinite or NaN coordinate;
* a batch index that is no image raises; on CUDA devices, where that would wait for the device, its region is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import reference
from .._library import define
from ._checks import pair
from ._rois import (
    Boxes,
    as_rois,
    check_input,
    check_position_sensitive,
    check_rois,
    position_sensitive_channels,
    register_linear_pooling,
)

define(
    "ps_roi_pool(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width) -> Tensor",
    reference.ps_roi_pool.ps_roi_pool,
    triton=True,
)
define(
    "ps_roi_pool_backward(Tensor grad, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "SymInt batch_size, SymInt channels, SymInt height, SymInt width) -> Tensor",
    reference.ps_roi_pool.ps_roi_pool_backward,
    triton=True,
)


def ps_roi_pool(
    input: Tensor,
    boxes: Boxes,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """The mean of each bin of each region, where every bin has channels of its own.

    Bin ``(ph, pw)`` of output channel ``c`` is the mean over pixels of input channel ``(c * PH + ph) * PW + pw`` (Dai
    et al., "R-FCN: Object Detection via Region-based Fully Convolutional Networks", NIPS 2016, section 3).

    Args:
        input: ``[N, C * PH * PW, H, W]``, any floating type, contiguous or channels-last.
        boxes: ``[K, 5]`` as ``(batch index, x1, y1, x2, y2)``, or a list of one ``[L, 4]`` per image, in the units of
            the image that ``spatial_scale`` relates to the map; any floating type.
        output_size: bins, ``PH`` or ``(PH, PW)``.
        spatial_scale: map pixels per unit of ``boxes``, such as 1/16.

    Returns:
        ``[K, C, PH, PW]`` in the input's dtype and memory format. Differentiable with respect to ``input`` in both
        modes, twice; gradients are bit-equal for any number of threads. Boxes get no gradient.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or device, such as channels that are no multiple of
            ``PH * PW``.
        RuntimeError: a batch index outside 0 to N - 1 (on the CPU).

    Example:
        >>> import torch, fastcv
        >>> x = torch.arange(4.).reshape(1, 4, 1, 1).expand(1, 4, 6, 6)
        >>> fastcv.ops.ps_roi_pool(x, [torch.tensor([[1., 1., 5., 5.]])], 2).flatten()
        tensor([0., 1., 2., 3.])
    """
    check_input("input", input)
    height, width = pair("output_size", output_size)
    check_position_sensitive(input, height, width)
    rois = as_rois(boxes, input.shape[0])
    check_rois(input, rois)
    return torch.ops.fastcv.ps_roi_pool(input, rois, spatial_scale, height, width)


class PSRoIPool(nn.Module):
    """:func:`ps_roi_pool` as a layer; see there for arguments and shapes."""

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        return ps_roi_pool(input, rois, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"


register_linear_pooling("ps_roi_pool", channels=position_sensitive_channels)
