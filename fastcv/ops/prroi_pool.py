"""Precise RoI pooling (:func:`prroi_pool`), and its layer.

Defined on every path alike:

* pixels outside the map are 0, to which the interpolation falls within a pixel of the border;
* a region without extent, inverted, or with an infinite or NaN coordinate gives 0, and gets gradient 0;
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

# part: 0 for the pooled map, 1 to 4 for its derivative by x1, y1, x2 and y2.
define(
    "prroi_pool(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width, int part) "
    "-> Tensor",
    reference.prroi_pool.prroi_pool,
    triton=True,
)
define(
    "prroi_pool_backward(Tensor grad, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "SymInt batch_size, SymInt channels, SymInt height, SymInt width, int part) -> Tensor",
    reference.prroi_pool.prroi_pool_backward,
    triton=True,
)


def prroi_pool(input: Tensor, boxes: Boxes, output_size: int | tuple[int, int], spatial_scale: float = 1.0) -> Tensor:
    """Pool regions of a feature map to a fixed size by integrals, differentiable with respect to the regions as well.

    Each region is divided into bins, and a bin is the mean of the interpolated map over its area: no samples, no
    rounding, and a smooth function of the region's corners (Jiang et al., "Acquisition of Localization Confidence for
    Accurate Object Detection", ECCV 2018, section 3.2).

    Args:
        input: ``[N, C, H, W]``, any floating type, contiguous or channels-last.
        boxes: ``[K, 5]`` as ``(batch index, x1, y1, x2, y2)``, or a list of one ``[L, 4]`` per image, in the units of
            the image that ``spatial_scale`` relates to the map, whose pixel centres lie at whole numbers; any floating
            type.
        output_size: bins, ``PH`` or ``(PH, PW)``.
        spatial_scale: map pixels per unit of ``boxes``, such as 1/16.

    Returns:
        ``[K, C, PH, PW]`` in the input's dtype and memory format. Differentiable in both modes with respect to
        ``input``, twice, and ``boxes``; gradients are bit-equal for any number of threads.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or device.
        RuntimeError: a batch index outside 0 to N - 1 (on the CPU); a second derivative by ``boxes`` is asked for.

    Example:
        >>> import torch, fastcv
        >>> x = torch.arange(16.).reshape(1, 1, 4, 4)
        >>> box = torch.tensor([[0., 0., 1., 2., 3.]], requires_grad=True)
        >>> mean = fastcv.ops.prroi_pool(x, box, 1)
        >>> mean.item(), torch.autograd.grad(mean.sum(), box)[0].tolist()
        (9.0, [[0.0, 0.5, 2.0, 0.5, 2.0]])
    """
    check_input("input", input)
    rois = as_rois(boxes, input.shape[0])
    check_rois(input, rois)
    height, width = pair("output_size", output_size)
    return torch.ops.fastcv.prroi_pool(input, rois, spatial_scale, height, width, 0)


class PrRoIPool(nn.Module):
    """:func:`prroi_pool` as a layer; see there for arguments and shapes."""

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        return prroi_pool(input, rois, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"


register_linear_pooling(
    "prroi_pool", channels=lambda input, pooled_height, pooled_width: input.shape[1], has_box_parts=True
)
