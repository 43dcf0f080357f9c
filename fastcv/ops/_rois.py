"""What the RoI operators share: forms of ``boxes``, checks, fake outputs, vmap by folding images together."""

from __future__ import annotations

import torch
from torch import Tensor

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
