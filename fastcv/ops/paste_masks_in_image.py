"""Masks of detections at their place in the image: :func:`paste_masks_in_image`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define
from ._autograd import register_autograd
from ._checks import check_floating, check_same_device, check_shape, pair
from ._rois import front

_reference = reference.paste_masks_in_image
define(
    "paste_masks_in_image(Tensor masks, Tensor corners, SymInt height, SymInt width, SymInt padding) -> Tensor",
    _reference.paste_masks_in_image,
    triton=True,
)


def paste_masks_in_image(masks: Tensor, boxes: Tensor, img_shape: tuple[int, int], padding: int = 1) -> Tensor:
    """Resizes the mask of each detection to its box and puts it there in an image of zeros.

    As ``torchvision.models.detection.roi_heads.paste_masks_in_image``, which resizes, pads and stacks one mask after
    the other; here each pixel of the result is written once, and nothing else of its size is made. What Mask R-CNN does
    with its masks (He et al., "Mask R-CNN", ICCV 2017, section 3.1, inference), before they are cut at 0.5.

    A mask gets a border of ``padding`` zeros, its box grows by as much about the centre, and the grown box is cut to
    integers; the mask is resized to the pixels that it then covers, bilinear, corners not aligned. What lies outside
    the image is left out.

    Args:
        masks: ``[N, 1, MH, MW]``, any floating type, usually probabilities of 28 x 28.
        boxes: ``[N, 4]`` as ``(x1, y1, x2, y2)`` in pixels of the image, any floating type (float16 and bfloat16 are
            computed in float32).
        img_shape: height and width of the image.
        padding: 0 or more.

    Returns:
        ``[N, 1, H, W]`` of the type of ``masks``, contiguous. Differentiable with respect to ``masks``, in both modes,
        also twice; boxes are constants.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device or range.

    A box that is not finite, or whose second corner is before the first, gives zeros. Sums are in float32,
    float64 for float64.

    Example:
        >>> import torch, fastcv
        >>> masks = torch.ones(1, 1, 2, 2)
        >>> fastcv.ops.paste_masks_in_image(masks, torch.tensor([[1., 1., 2., 2.]]), (4, 5), padding=0)[0, 0]
        tensor([[0., 0., 0., 0., 0.],
                [0., 1., 1., 0., 0.],
                [0., 1., 1., 0., 0.],
                [0., 0., 0., 0., 0.]])
    """
    check_floating("masks", masks)
    check_floating("boxes", boxes)
    check_shape("masks", masks, ("N", 1, "MH", "MW"))
    check_shape("boxes", boxes, (masks.shape[0], 4))
    check_same_device("boxes", boxes, "masks", masks)
    if masks.shape[2] < 1 or masks.shape[3] < 1:
        raise ValueError(f"masks: expected masks of at least a pixel, got shape {list(masks.shape)}")
    height, width = pair("img_shape", tuple(img_shape), 0)
    if isinstance(padding, bool) or not isinstance(padding, (int, torch.SymInt)) or not 0 <= padding < 2**24:
        raise ValueError(f"padding: expected an int from 0 to 2^24, got {padding!r}")
    dtype = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    corners = _reference.expanded_corners(boxes.detach().to(dtype), masks.shape[2:], padding)
    return torch.ops.fastcv.paste_masks_in_image(masks, corners, height, width, padding)


@torch.library.register_fake("fastcv::paste_masks_in_image", lib=LIBRARY)
def _(masks, corners, height, width, padding):
    return masks.new_empty(masks.shape[0], 1, height, width)


def _setup_context(ctx, inputs, output):
    masks, corners, *ctx.constants = inputs
    ctx.sizes = masks.shape[2:]
    ctx.save_for_backward(corners)
    ctx.save_for_forward(corners)


def _backward(ctx, grad):
    (corners,) = ctx.saved_tensors
    gradient = _reference.paste_masks_in_image_backward(grad, corners, *ctx.sizes, ctx.constants[2])
    return gradient, None, None, None, None


def _jvp(ctx, tangent, *_):
    (corners,) = ctx.saved_tensors
    return torch.ops.fastcv.paste_masks_in_image(tangent, corners, *ctx.constants)


register_autograd("paste_masks_in_image", setup_context=_setup_context, backward=_backward, jvp=_jvp)


@torch.library.register_vmap("fastcv::paste_masks_in_image", lib=LIBRARY)
def _(info, in_dims, masks, corners, *constants):
    folded = (
        front(tensor, dim, info.batch_size).flatten(0, 1)
        for tensor, dim in zip((masks, corners), in_dims, strict=False)
    )
    result = torch.ops.fastcv.paste_masks_in_image(*folded, *constants)
    return result.unflatten(0, (info.batch_size, -1)), 0
