"""What the RoI operators share: forms of ``boxes``, checks, fake outputs, vmap by folding images together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._library import LIBRARY
from ._autograd import register_autograd
from ._checks import check_floating, check_same_device, check_shape, check_tensor

Boxes = Tensor | list[Tensor] | tuple[Tensor, ...]


def as_rois(boxes: Boxes, images: int) -> Tensor:
    """``boxes`` as ``[K, 5]``: a tensor as it is, a list of one ``[L, 4]`` per image with its batch index in front."""
    if isinstance(boxes, Tensor):
        check_floating("boxes", boxes)
        check_shape("boxes", boxes, ("K", 5))
        return boxes
    if not isinstance(boxes, (list, tuple)):
        raise TypeError(f"boxes: expected a Tensor [K, 5] or a list of Tensors [L, 4], got {type(boxes).__name__}")
    if len(boxes) != images:
        raise ValueError(f"boxes: expected a list of {images} tensors, one per image, got {len(boxes)}")
    for i, b in enumerate(boxes):
        check_floating(f"boxes[{i}]", b)
        check_shape(f"boxes[{i}]", b, ("L", 4))
        check_same_device(f"boxes[{i}]", b, "boxes[0]", boxes[0])
    if not boxes:
        return torch.zeros(0, 5)
    rows = torch.cat(tuple(boxes))
    # Half types cannot hold large batch indices.
    rows = rows if rows.dtype == torch.float64 else rows.float()
    images_of = [torch.full_like(b[:, :1], i, dtype=rows.dtype) for i, b in enumerate(boxes)]
    return torch.cat([torch.cat(images_of), rows], dim=1)


def check_input(name: str, input: Tensor) -> None:
    check_tensor(name, input)
    check_floating(name, input)
    check_shape(name, input, ("N", "C", "H", "W"))


def check_rois(input: Tensor, rois: Tensor) -> None:
    check_same_device("boxes", rois, "input", input)


def check_position_sensitive(input: Tensor, pooled_height: int, pooled_width: int) -> None:
    if input.shape[1] % (pooled_height * pooled_width):
        raise ValueError(
            f"input: expected channels that are a multiple of {pooled_height} * {pooled_width}, one for each bin of "
            f"output_size, got {input.shape[1]}"
        )


def position_sensitive_channels(input: Tensor, pooled_height: int, pooled_width: int) -> int:
    return input.shape[1] // (pooled_height * pooled_width)


def fake_pooled(input: Tensor, rois: Tensor, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    """An output ``[K, *size]`` in the memory format of the input."""
    memory_format = torch._prims_common.suggest_memory_format(input)
    return torch.empty(
        (rois.shape[0], *size),
        dtype=dtype or input.dtype,
        device=input.device,
        memory_format=memory_format,
    )


def fold_images(input: Tensor, dim: int | None, size: int) -> Tensor:
    """A mapped ``[..., N, C, H, W]`` as ``[size * N, C, H, W]``."""
    return front(input, dim, size).flatten(0, 1)


def fold_rois(rois: Tensor, dim: int | None, size: int, images: int) -> Tensor:
    """Mapped regions as ``[size * K, 5]`` whose batch indices point into the folded images."""
    rois = front(rois, dim, size)
    # Half types cannot hold large batch indices.
    rois = rois if rois.dtype == torch.float64 else rois.float()
    first = images * torch.arange(size, dtype=rois.dtype, device=rois.device)
    index = rois[..., :1]
    # One that is no image's stays outside the folded range, and NaN stays NaN.
    offset = torch.where(index < images, first[:, None, None], images * size)
    shifted = torch.where(index < 0, index, index + offset)
    return torch.cat([shifted, rois[..., 1:]], dim=-1).flatten(0, 1)


def front(value: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension in front, expanded where the value is not mapped."""
    return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)


# ---- operators that are linear in their input: roi_align, ps_roi_align, ps_roi_pool ----------------
#
# NAME(input, boxes, *bins, *rest) and NAME_backward(grad, boxes, *bins, *shape, *rest), where bins are spatial_scale,
# pooled_height and pooled_width, and shape is that of the input. Each is the other's derivative.


def register_linear_pooling(name: str, channels: Callable[[Tensor, int, int], int]) -> None:
    """Fake kernels, derivatives in both modes and vmap rules of ``fastcv::NAME`` and ``fastcv::NAME_backward``.

    Args:
        name: of the operator.
        channels: ``(input, pooled_height, pooled_width)`` -> channels of the output.
    """
    forward, backward = getattr(torch.ops.fastcv, name), getattr(torch.ops.fastcv, f"{name}_backward")

    def fake_forward(input, boxes, scale, pooled_height, pooled_width, *rest):
        size = channels(input, pooled_height, pooled_width), pooled_height, pooled_width
        return fake_pooled(input, boxes, *size)

    def fake_backward(grad, boxes, scale, pooled_height, pooled_width, *constants):
        memory_format = torch._prims_common.suggest_memory_format(grad)
        return torch.empty(constants[:4], dtype=grad.dtype, device=grad.device, memory_format=memory_format)

    def save(ctx, inputs, output):
        ctx.shape = inputs[0].shape
        _, boxes, *ctx.constants = inputs
        ctx.save_for_backward(boxes)
        ctx.save_for_forward(boxes)

    def gradient_of_forward(ctx, grad):
        bins, rest = ctx.constants[:3], ctx.constants[3:]
        return backward(grad, *ctx.saved_tensors, *bins, *ctx.shape, *rest), None, *[None] * len(ctx.constants)

    def gradient_of_backward(ctx, grad):
        bins, rest = ctx.constants[:3], ctx.constants[7:]
        return forward(grad, *ctx.saved_tensors, *bins, *rest), None, *[None] * len(ctx.constants)

    def tangent_of(operator):
        def jvp(ctx, tangent, *_):
            return None if tangent is None else operator(tangent, *ctx.saved_tensors, *ctx.constants)

        return jvp

    # The mapped dimension joins the images.
    def vmap_forward(info, in_dims, input, boxes, *constants):
        size = info.batch_size
        images = front(input, in_dims[0], size).shape[1]
        rois = fold_rois(boxes, in_dims[1], size, images)
        return forward(fold_images(input, in_dims[0], size), rois, *constants).unflatten(0, (size, -1)), 0

    def vmap_backward(info, in_dims, grad, boxes, *constants):
        size, images = info.batch_size, constants[3]
        rois = fold_rois(boxes, in_dims[1], size, images)
        folded = *constants[:3], images * size, *constants[4:]
        return backward(fold_images(grad, in_dims[0], size), rois, *folded).unflatten(0, (size, images)), 0

    for operator, fake, gradient, vmap in (
        (forward, fake_forward, gradient_of_forward, vmap_forward),
        (backward, fake_backward, gradient_of_backward, vmap_backward),
    ):
        qualified = f"fastcv::{operator.__name__}"
        torch.library.register_fake(qualified, fake, lib=LIBRARY)
        torch.library.register_vmap(qualified, vmap, lib=LIBRARY)
        register_autograd(operator.__name__, setup_context=save, backward=gradient, jvp=tangent_of(operator))
