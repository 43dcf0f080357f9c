"""RoIAlign on one map (:func:`roi_align`), and its layer.

Defined on every path alike:

* a sample more than a pixel outside the map counts as 0; a region with an infinite or NaN coordinate gives 0;
* an inverted region is sampled backwards with a fixed ``sampling_ratio`` and gives 0 with an adaptive one;
* a batch index that is no image raises; on CUDA devices, where that would wait for the device, its region is NaN;
* features and boxes may differ in type; sums are in float32 (float64 for float64 features), coordinates in float32
  (float64 where boxes or features are), so half-precision features lose nothing in the coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import reference
from .._library import define
from ._checks import pair
from ._rois import Boxes, as_rois, check_input, check_rois, register_linear_pooling

define(
    "roi_align(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
    reference.roi_align.roi_align,
    triton=True,
)
define(
    "roi_align_backward(Tensor grad, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "SymInt batch_size, SymInt channels, SymInt height, SymInt width, int sampling_ratio, bool aligned) -> Tensor",
    reference.roi_align.roi_align_backward,
    triton=True,
)


def roi_align(
    input: Tensor,
    boxes: Boxes,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Pool regions of a feature map to a fixed size, without rounding their coordinates.

    Each region is divided into bins, and a bin is the mean of bilinear samples on a regular grid inside it (He et al.,
    "Mask R-CNN", ICCV 2017, section 3).

    Args:
        input: ``[N, C, H, W]``, any floating type, contiguous or channels-last.
        boxes: ``[K, 5]`` as ``(batch index, x1, y1, x2, y2)``, or a list of one ``[L, 4]`` per image, in the units of
            the image that ``spatial_scale`` relates to the map; any floating type.
        output_size: bins, ``PH`` or ``(PH, PW)``.
        spatial_scale: map pixels per unit of ``boxes``, such as 1/16.
        sampling_ratio: samples per bin along each axis; 0 or less: one per pixel, ``ceil(size / bins)``.
        aligned: shift coordinates by half a pixel, so that pixel centres lie at half-integers. False is the convention
            of the first implementations, which also widens regions to at least one pixel.

    Returns:
        ``[K, C, PH, PW]`` in the input's dtype and memory format. Differentiable with respect to ``input`` in both
        modes, twice; gradients are bit-equal for any number of threads. Boxes get no gradient.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or device.
        RuntimeError: a batch index outside 0 to N - 1 (on the CPU).

    Example:
        >>> import torch, fastcv
        >>> x = torch.arange(16.).reshape(1, 1, 4, 4)
        >>> fastcv.ops.roi_align(x, [torch.tensor([[0., 0., 4., 4.]])], 2, aligned=True).flatten()
        tensor([ 2.5000,  4.5000, 10.5000, 12.5000])
    """
    check_input("input", input)
    rois = as_rois(boxes, input.shape[0])
    check_rois(input, rois)
    height, width = pair("output_size", output_size)
    return torch.ops.fastcv.roi_align(input, rois, spatial_scale, height, width, sampling_ratio, aligned)


class RoIAlign(nn.Module):
    """:func:`roi_align` as a layer; see there for arguments and shapes."""

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = False,
    ):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )


register_linear_pooling("roi_align", channels=lambda input, pooled_height, pooled_width: input.shape[1])
