"""RoIAlign of rotated regions (:func:`roi_align_rotated`), and its layer.

Defined on every path alike, as :func:`roi_align`:

* a sample more than a pixel outside the map counts as 0;
* a region without extent (with ``aligned``), inverted, larger than a million pixels, or with an infinite or NaN number
  gives 0;
* a batch index that is no image raises; on CUDA devices, where that would wait for the device, its region is NaN;
* features and boxes may differ in type; sums are in float32 (float64 for float64 features), coordinates in float32
  (float64 where boxes or features are).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import reference
from .._library import define
from ._checks import pair
from ._rois import Boxes, as_rois, check_input, check_rois, register_linear_pooling

define(
    "roi_align_rotated(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned, bool clockwise) -> Tensor",
    reference.roi_align_rotated.roi_align_rotated,
    triton=True,
)
define(
    "roi_align_rotated_backward(Tensor grad, Tensor boxes, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, SymInt batch_size, SymInt channels, SymInt height, SymInt width, int sampling_ratio, "
    "bool aligned, bool clockwise) -> Tensor",
    reference.roi_align_rotated.roi_align_rotated_backward,
    triton=True,
)


def roi_align_rotated(
    input: Tensor,
    boxes: Boxes,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = True,
    clockwise: bool = False,
) -> Tensor:
    """Pool rotated regions of a feature map to a fixed size: text lines, vehicles seen from above, ships.

    Each region is divided into bins in its own frame, and a bin is the mean of bilinear samples on a grid that is
    turned with it (He et al., "Mask R-CNN", ICCV 2017, section 3; Ma et al., "Arbitrary-oriented scene text detection
    via rotation proposals", IEEE Transactions on Multimedia 20(11), 2018, section IV).

    Args:
        input: ``[N, C, H, W]``, any floating type, contiguous or channels-last.
        boxes: ``[K, 6]`` as ``(batch index, cx, cy, w, h, angle)``, or a list of one ``[L, 5]`` per image: centre and
            sides in the units of the image that ``spatial_scale`` relates to the map, the angle in degrees; any
            floating type.
        output_size: bins, ``PH`` or ``(PH, PW)``.
        spatial_scale: map pixels per unit of ``boxes``, such as 1/16.
        sampling_ratio: samples per bin along each axis; 0 or less: one per pixel, ``ceil(size / bins)``.
        aligned: shift coordinates by half a pixel, so that pixel centres lie at half-integers. False also widens
            regions to at least one pixel.
        clockwise: which way the angle turns on the screen; by default as in :func:`box_convert`, counter-clockwise.

    Returns:
        ``[K, C, PH, PW]`` in the input's dtype and memory format. Differentiable with respect to ``input`` in both
        modes, twice; gradients are bit-equal for any number of threads. Boxes get no gradient.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or device.
        RuntimeError: a batch index outside 0 to N - 1 (on the CPU).

    Example:
        >>> import torch, fastcv
        >>> x = torch.arange(16.).reshape(1, 1, 4, 4)
        >>> fastcv.ops.roi_align_rotated(x, [torch.tensor([[2., 2., 4., 4., 90.]])], 2).flatten()
        tensor([10.5000,  2.5000, 12.5000,  4.5000])
    """
    check_input("input", input)
    rois = as_rois(boxes, input.shape[0], columns=5)
    check_rois(input, rois)
    height, width = pair("output_size", output_size)
    return torch.ops.fastcv.roi_align_rotated(
        input, rois, spatial_scale, height, width, sampling_ratio, aligned, clockwise
    )


class RoIAlignRotated(nn.Module):
    """:func:`roi_align_rotated` as a layer; see there for arguments and shapes."""

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int = -1,
        aligned: bool = True,
        clockwise: bool = False,
    ):
        super().__init__()
        self.output_size, self.spatial_scale, self.sampling_ratio = output_size, spatial_scale, sampling_ratio
        self.aligned, self.clockwise = aligned, clockwise

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        return roi_align_rotated(
            input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned, self.clockwise
        )

    def extra_repr(self) -> str:
        names = ("output_size", "spatial_scale", "sampling_ratio", "aligned", "clockwise")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


register_linear_pooling("roi_align_rotated", channels=lambda input, pooled_height, pooled_width: input.shape[1])
