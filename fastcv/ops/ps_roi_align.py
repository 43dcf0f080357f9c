"""Position-sensitive RoIAlign (:func:`ps_roi_align`), and its layer.

Defined on every path alike, as for :func:`fastcv.ops.roi_align` with ``aligned=True``:

* a sample more than a pixel outside the map counts as 0; a region with an infinite or NaN coordinate gives 0;
* a region without extent has no samples where the sampling is adaptive, and gives 0 (torchvision: NaN, 0 / 0);
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
    "ps_roi_align(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio) -> Tensor",
    reference.ps_roi_align.ps_roi_align,
    triton=True,
)
define(
    "ps_roi_align_backward(Tensor grad, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "SymInt batch_size, SymInt channels, SymInt height, SymInt width, int sampling_ratio) -> Tensor",
    reference.ps_roi_align.ps_roi_align_backward,
    triton=True,
)


def ps_roi_align(
    input: Tensor,
    boxes: Boxes,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> Tensor:
    """RoIAlign where every bin has channels of its own.

    Bin ``(ph, pw)`` of output channel ``c`` is the mean of bilinear samples of input channel
    ``(c * PH + ph) * PW + pw`` (Li et al., "Light-Head R-CNN", arXiv 2017, section 3, with the pooling of R-FCN, Dai et
    al., NIPS 2016, section 3). Coordinates are shifted by half a pixel, so that pixel centres lie at half-integers.

    Args:
        input: ``[N, C * PH * PW, H, W]``, any floating type, contiguous or channels-last.
        boxes: ``[K, 5]`` as ``(batch index, x1, y1, x2, y2)``, or a list of one ``[L, 4]`` per image, in the units of
            the image that ``spatial_scale`` relates to the map; any floating type.
        output_size: bins, ``PH`` or ``(PH, PW)``.
        spatial_scale: map pixels per unit of ``boxes``, such as 1/16.
        sampling_ratio: samples per bin along each axis; 0 or less: one per pixel, ``ceil(size / bins)``.

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
        >>> fastcv.ops.ps_roi_align(x, [torch.tensor([[1., 1., 5., 5.]])], 2).flatten()
        tensor([0., 1., 2., 3.])
    """
    check_input("input", input)
    height, width = pair("output_size", output_size)
    check_position_sensitive(input, height, width)
    rois = as_rois(boxes, input.shape[0])
    check_rois(input, rois)
    return torch.ops.fastcv.ps_roi_align(input, rois, spatial_scale, height, width, sampling_ratio)


class PSRoIAlign(nn.Module):
    """:func:`ps_roi_align` as a layer; see there for arguments and shapes."""

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float, sampling_ratio: int):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        return ps_roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, sampling_ratio={self.sampling_ratio}"
        )


register_linear_pooling("ps_roi_align", channels=position_sensitive_channels)
