"""RoI pooling: :func:`roi_pool` and its layer.

Defined on every path alike:

* corners are scaled and rounded half away from zero; a region includes both corner pixels and is at least a pixel;
* a bin without a pixel of the map is 0, as is every bin of a region with an infinite or NaN coordinate;
* NaN features never win; a bin of nothing but NaN gives -infinity; equal maxima go to the first pixel in reading order;
* a batch index that is no image raises; on CUDA devices, where that would wait for the device, its region is NaN.
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
    "roi_pool(Tensor input, Tensor boxes, float spatial_scale, SymInt pooled_height, SymInt pooled_width) "
    "-> (Tensor, Tensor)",
    reference.roi_pool.roi_pool,
    triton=True,
)
define(
    "roi_pool_backward(Tensor grad, Tensor boxes, Tensor argmax, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, SymInt batch_size, SymInt channels, SymInt height, SymInt width) -> Tensor",
    reference.roi_pool.roi_pool_backward,
    triton=True,
)


def roi_pool(input: Tensor, boxes: Boxes, output_size: int | tuple[int, int], spatial_scale: float = 1.0) -> Tensor:
    """The maximum of each bin of each region (Girshick, "Fast R-CNN", ICCV 2015, section 2.1).

    Args:
        input: ``[N, C, H, W]``, any floating type, contiguous or channels-last.
        boxes: ``[K, 5]`` as ``(batch index, x1, y1, x2, y2)``, or a list of one ``[L, 4]`` per image, in the units
            of the image that ``spatial_scale`` relates to the map; any floating type.
        output_size: bins, ``PH`` or ``(PH, PW)``.
        spatial_scale: map pixels per unit of ``boxes``, such as 1/16.

    Returns:
        ``[K, C, PH, PW]`` in the input's dtype and memory format. Differentiable with respect to ``input`` in both
        modes, twice; gradients are bit-equal for any number of threads. Boxes get no gradient.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or device.
        RuntimeError: a batch index outside 0 to N - 1 (on the CPU).

    Example:
        >>> import torch, fastcv
        >>> x = torch.arange(16.).reshape(1, 1, 4, 4)
        >>> fastcv.ops.roi_pool(x, [torch.tensor([[0., 0., 3., 3.]])], 2).flatten()
        tensor([ 5.,  7., 13., 15.])
    """
    check_input("input", input)
    rois = as_rois(boxes, input.shape[0])
    check_rois(input, rois)
    height, width = pair("output_size", output_size)
    return torch.ops.fastcv.roi_pool(input, rois, spatial_scale, height, width)[0]


class RoIPool(nn.Module):
    """:func:`roi_pool` as a layer; see there for arguments and shapes."""

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        return roi_pool(input, rois, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"


# ---- fake kernels --------------------------------------------------------------------------------


@torch.library.register_fake("fastcv::roi_pool", lib=LIBRARY)
def _(input, boxes, spatial_scale, pooled_height, pooled_width):
    size = (input.shape[1], pooled_height, pooled_width)
    return fake_pooled(input, boxes, *size), fake_pooled(input, boxes, *size, dtype=torch.int32)


@torch.library.register_fake("fastcv::roi_pool_backward", lib=LIBRARY)
def _(grad, boxes, argmax, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width):
    memory_format = torch._prims_common.suggest_memory_format(grad)
    shape = (batch_size, channels, height, width)
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)


# ---- derivatives: a selection by argmax, linear in what it selects from -------------------------------


def _select(map: Tensor, boxes: Tensor, argmax: Tensor) -> Tensor:
    """What each bin's maximum sees of another map ``[N, C, H, W]``."""
    selected = map.flatten(2)[reference.roi_pool.gather_index(boxes, argmax)].view(argmax.shape)
    return torch.where(argmax >= 0, selected, 0)


def _setup_forward(ctx, inputs, output):
    input, boxes, *ctx.constants = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros as gradient of the positions: as many as there are outputs
    ctx.save_for_backward(boxes, output[1])
    ctx.save_for_forward(boxes, output[1])
    ctx.shape = input.shape


def _backward_of_forward(ctx, grad, _):
    if grad is None:
        return None, None, None, None, None
    gradient = torch.ops.fastcv.roi_pool_backward(grad, *ctx.saved_tensors, *ctx.constants, *ctx.shape)
    return gradient, None, None, None, None


def _jvp_of_forward(ctx, tangent, *_):
    return _select(tangent, *ctx.saved_tensors), None


def _setup_backward(ctx, inputs, output):
    _, boxes, argmax, *ctx.constants = inputs
    ctx.save_for_backward(boxes, argmax)
    ctx.save_for_forward(boxes, argmax)


def _backward_of_backward(ctx, grad):
    return _select(grad, *ctx.saved_tensors), *[None] * 9


def _jvp_of_backward(ctx, tangent, *_):
    return torch.ops.fastcv.roi_pool_backward(tangent, *ctx.saved_tensors, *ctx.constants)


register_autograd("roi_pool", setup_context=_setup_forward, backward=_backward_of_forward, jvp=_jvp_of_forward)
register_autograd(
    "roi_pool_backward", setup_context=_setup_backward, backward=_backward_of_backward, jvp=_jvp_of_backward
)


# ---- vmap: the mapped dimension joins the images ---------------------------------------------------


def _vmap(info, in_dims, input, boxes, *constants):
    size = info.batch_size
    images = front(input, in_dims[0], size).shape[1]
    results = torch.ops.fastcv.roi_pool(
        fold_images(input, in_dims[0], size), fold_rois(boxes, in_dims[1], size, images), *constants
    )
    return tuple(r.unflatten(0, (size, -1)) for r in results), (0, 0)


def _backward_vmap(info, in_dims, grad, boxes, argmax, scale, height, width, images, *rest):
    size = info.batch_size
    gradient = torch.ops.fastcv.roi_pool_backward(
        front(grad, in_dims[0], size).flatten(0, 1), fold_rois(boxes, in_dims[1], size, images),
        front(argmax, in_dims[2], size).flatten(0, 1), scale, height, width, images * size, *rest,
    )  # fmt: skip
    return gradient.unflatten(0, (size, images)), 0


torch.library.register_vmap("fastcv::roi_pool", _vmap, lib=LIBRARY)
torch.library.register_vmap("fastcv::roi_pool_backward", _backward_vmap, lib=LIBRARY)
