"""RoIAlign on one map (:func:`roi_align`), and its layer.

Defined on every path alike:

* a sample more than a pixel outside the map counts as 0; a region with an infinite or NaN coordinate gives 0;
* an inverted region is sampled backwards with a fixed ``sampling_ratio`` and gives 0 with an adaptive one;
* a batch index that is no image raises;
* features and boxes may differ in type; sums are in float32 (float64 for float64 features), coordinates in float32
  (float64 where boxes or features are), so half-precision features lose nothing in the coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import reference
from .._library import LIBRARY, define
from ._autograd import register_autograd
from ._checks import pair
from ._rois import Boxes, as_rois, check_input, check_rois, fake_pooled, fold_images, fold_rois, front

define(
    "roi_align(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
    reference.roi_align.roi_align,
)
define(
    "roi_align_backward(Tensor grad, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "SymInt batch_size, SymInt channels, SymInt height, SymInt width, int sampling_ratio, bool aligned) -> Tensor",
    reference.roi_align.roi_align_backward,
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
        RuntimeError: a batch index outside 0 to N - 1.

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


# ---- fake kernels --------------------------------------------------------------------------------


@torch.library.register_fake("fastcv::roi_align", lib=LIBRARY)
def _(input, boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned):
    return fake_pooled(input, boxes, input.shape[1], pooled_height, pooled_width)


@torch.library.register_fake("fastcv::roi_align_backward", lib=LIBRARY)
def _(
    grad, boxes, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width,
    sampling_ratio, aligned,
):  # fmt: skip
    memory_format = torch._prims_common.suggest_memory_format(grad)
    shape = (batch_size, channels, height, width)
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)


# ---- derivatives: the operator is linear in its input, so each is the other's ------------------------


def _setup_forward(ctx, inputs, output):
    input, boxes, *ctx.constants = inputs
    ctx.save_for_backward(boxes)
    ctx.save_for_forward(boxes)
    ctx.shape = input.shape


def _backward_of_forward(ctx, grad):
    (boxes,) = ctx.saved_tensors
    *bins, sampling_ratio, aligned = ctx.constants
    gradient = torch.ops.fastcv.roi_align_backward(grad, boxes, *bins, *ctx.shape, sampling_ratio, aligned)
    return gradient, None, None, None, None, None, None


def _jvp_of_forward(ctx, tangent, *_):
    (boxes,) = ctx.saved_tensors
    return None if tangent is None else torch.ops.fastcv.roi_align(tangent, boxes, *ctx.constants)


def _setup_backward(ctx, inputs, output):
    _, boxes, *ctx.constants = inputs
    ctx.save_for_backward(boxes)
    ctx.save_for_forward(boxes)


def _backward_of_backward(ctx, grad):
    (boxes,) = ctx.saved_tensors
    *bins, _, _, _, _, sampling_ratio, aligned = ctx.constants
    gradient = torch.ops.fastcv.roi_align(grad, boxes, *bins, sampling_ratio, aligned)
    return gradient, *[None] * 10


def _jvp_of_backward(ctx, tangent, *_):
    (boxes,) = ctx.saved_tensors
    return None if tangent is None else torch.ops.fastcv.roi_align_backward(tangent, boxes, *ctx.constants)


register_autograd("roi_align", setup_context=_setup_forward, backward=_backward_of_forward, jvp=_jvp_of_forward)
register_autograd(
    "roi_align_backward",
    setup_context=_setup_backward,
    backward=_backward_of_backward,
    jvp=_jvp_of_backward,
)


# ---- vmap: the mapped dimension joins the images ---------------------------------------------------


def _roi_align_vmap(info, in_dims, input, boxes, *constants):
    size = info.batch_size
    images = front(input, in_dims[0], size).shape[1]
    pooled = torch.ops.fastcv.roi_align(
        fold_images(input, in_dims[0], size),
        fold_rois(boxes, in_dims[1], size, images),
        *constants,
    )
    return pooled.unflatten(0, (size, -1)), 0


def _roi_align_backward_vmap(info, in_dims, grad, boxes, *constants):
    size = info.batch_size
    scale, height, width, images, *rest = constants
    gradient = torch.ops.fastcv.roi_align_backward(
        front(grad, in_dims[0], size).flatten(0, 1),
        fold_rois(boxes, in_dims[1], size, images),
        scale, height, width, images * size, *rest,
    )  # fmt: skip
    return gradient.unflatten(0, (size, images)), 0


torch.library.register_vmap("fastcv::roi_align", _roi_align_vmap, lib=LIBRARY)
torch.library.register_vmap("fastcv::roi_align_backward", _roi_align_backward_vmap, lib=LIBRARY)
