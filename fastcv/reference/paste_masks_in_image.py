"""Masks pasted into images in plain PyTorch: the specification of ``csrc/paste_masks_in_image``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST = 2**30


def expanded_corners(boxes: Tensor, sizes: tuple[int, int], padding: int) -> Tensor:
    """int64 ``[N, 4]``: first and last pixel of the masks of ``sizes`` (height, width) with a border.

    The border widens the box about its centre. Boxes that are not finite come to lie outside any image.
    """
    height, width = ((size + 2 * padding) / size for size in sizes)
    x1, y1, x2, y2 = boxes.unbind(1)
    half_w, half_h = (x2 - x1) * 0.5 * width, (y2 - y1) * 0.5 * height
    x, y = (x2 + x1) * 0.5, (y2 + y1) * 0.5
    corners = torch.stack([x - half_w, y - half_h, x + half_w, y + half_h], 1).clamp(-_MOST, _MOST)
    return corners.nan_to_num(-_MOST).long()


def _weights(low: Tensor, high: Tensor, size: int, pixels: int, dtype: torch.dtype) -> Tensor:
    """``[N, pixels, size]``: how much of each element of an axis of the mask is in each pixel of the image."""
    low, high = low[:, None].clamp(-_MOST, _MOST), high[:, None].clamp(-_MOST, _MOST)
    i = torch.arange(pixels, device=low.device)
    extent = (high - low + 1).clamp(min=1)
    position = (size / extent.to(dtype) * ((i - low).to(dtype) + 0.5) - 0.5).clamp(0, size - 1)
    first = position.floor().long()
    fraction = (position - first)[..., None]
    weights = F.one_hot(first, size) * (1 - fraction) + F.one_hot((first + 1).clamp(max=size - 1), size) * fraction
    inside = (i >= low) & (i < low + extent) & (high >= low)
    return torch.where(inside[..., None], weights, 0)


def _both_weights(corners: Tensor, sizes, image, padding: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of rows and of columns, for the mask without its border, which is zero."""
    weights = (
        _weights(corners[:, 1 - axis], corners[:, 3 - axis], sizes[axis] + 2 * padding, image[axis], dtype)
        for axis in (0, 1)
    )
    rows, columns = (w[:, :, padding : w.shape[2] - padding] for w in weights)
    return rows, columns


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def paste_masks_in_image(masks: Tensor, corners: Tensor, height: int, width: int, padding: int) -> Tensor:
    dtype = _accumulate(masks.dtype)
    rows, columns = _both_weights(corners, masks.shape[2:], (height, width), padding, dtype)
    return (rows @ masks[:, 0].to(dtype) @ columns.mT)[:, None].to(masks.dtype)


def paste_masks_in_image_backward(
    grad: Tensor, corners: Tensor, mask_height: int, mask_width: int, padding: int
) -> Tensor:
    dtype = _accumulate(grad.dtype)
    rows, columns = _both_weights(corners, (mask_height, mask_width), grad.shape[2:], padding, dtype)
    return (rows.mT @ grad[:, 0].to(dtype) @ columns)[:, None].to(grad.dtype)
