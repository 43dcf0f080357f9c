"""What the RoI operators share: forms of ``boxes``, checks, fake outputs, vmap by folding images together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._library import LIBRARY
from ._autograd import register_autograd
from ._checks import check_floating, check_same_device, check_shape, check_tensor

Boxes = Tensor | list[Tensor] | tuple[Tensor, ...]


def as_rois(boxes: Boxes, images: int, columns: int = 4) -> Tensor:
    """``boxes`` as ``[K, 5]``: a tensor as it is, a list of one ``[L, 4]`` per image with its batch index in front.
    ``columns``: 5 for rotated ones."""
    if isinstance(boxes, Tensor):
        check_floating("boxes", boxes)
        check_shape("boxes", boxes, ("K", 1 + columns))
        return boxes
    if not isinstance(boxes, (list, tuple)):
        expected = f"a Tensor [K, {1 + columns}] or a list of Tensors [L, {columns}]"
        raise TypeError(f"boxes: expected {expected}, got {type(boxes).__name__}")
    if len(boxes) != images:
        raise ValueError(f"boxes: expected a list of {images} tensors, one per image, got {len(boxes)}")
    for i, b in enumerate(boxes):
        check_floating(f"boxes[{i}]", b)
        check_shape(f"boxes[{i}]", b, ("L", columns))
        check_same_device(f"boxes[{i}]", b, "boxes[0]", boxes[0])
    if not boxes:
        return torch.zeros(0, 1 + columns)
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


def register_linear_pooling(
    name: str, channels: Callable[[Tensor, int, int], int], has_box_parts: bool = False
) -> None:
    """Fake kernels, derivatives in both modes and vmap rules of ``fastcv::NAME`` and ``fastcv::NAME_backward``.

    Args:
        name: of the operator.
        channels: ``(input, pooled_height, pooled_width)`` -> channels of the output.
        has_box_parts: the last argument is a number of what is computed, 0 for the operator itself and 1 to 4 for its
            derivative by the coordinates of the boxes, which then have derivatives too.
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
        values, boxes, *ctx.constants = inputs
        saved = (boxes, values) if has_box_parts else (boxes,)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    def gradient_of_boxes(ctx, input, grad):
        """Of the sum of NAME(input) * grad."""
        if not has_box_parts or not ctx.needs_input_grad[1]:
            return None
        boxes, bins = ctx.saved_tensors[0], ctx.constants[:3]
        _only_first(name, ctx.constants[-1])
        wide = torch.promote_types(torch.float32, grad.dtype)
        parts = [(grad.to(wide) * forward(input, boxes, *bins, part)).sum((1, 2, 3)) for part in (1, 2, 3, 4)]
        return torch.stack([torch.zeros_like(parts[0]), *parts], 1).to(boxes.dtype)

    def gradient_of_forward(ctx, grad):
        boxes, *values = ctx.saved_tensors
        bins, rest = ctx.constants[:3], ctx.constants[3:]
        of_input = backward(grad, boxes, *bins, *ctx.shape, *rest) if ctx.needs_input_grad[0] else None
        return of_input, gradient_of_boxes(ctx, *values or [None], grad), *[None] * len(ctx.constants)

    def gradient_of_backward(ctx, grad):
        boxes, *values = ctx.saved_tensors
        bins, rest = ctx.constants[:3], ctx.constants[7:]
        of_grad = forward(grad, boxes, *bins, *rest) if ctx.needs_input_grad[0] else None
        return of_grad, gradient_of_boxes(ctx, grad, *values or [None]), *[None] * len(ctx.constants)

    def tangent_of(operator):
        def jvp(ctx, tangent, boxes_tangent, *_):
            boxes, *values = ctx.saved_tensors
            result = None if tangent is None else operator(tangent, boxes, *ctx.constants)
            if not has_box_parts or boxes_tangent is None:
                return result
            _only_first(name, ctx.constants[-1])
            return _tangent_of_boxes(operator, *values, boxes, boxes_tangent, ctx.constants[:-1], result)

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


def _only_first(name: str, part: int) -> None:
    if part:
        raise RuntimeError(f"{name}: second derivatives with respect to boxes are not implemented; detach the boxes")


def _tangent_of_boxes(operator, values: Tensor, boxes: Tensor, tangent: Tensor, constants, result: Tensor | None):
    """``result`` plus what a change of the boxes adds."""
    is_backward = len(constants) > 3  # whose values are gradients of regions, and whose result is summed over regions
    for part in (1, 2, 3, 4):
        rate = tangent[:, part, None, None, None].to(values.dtype)
        added = (
            operator(values * rate, boxes, *constants, part)
            if is_backward
            else operator(values, boxes, *constants, part) * rate
        )
        result = added if result is None else result + added
    return result
