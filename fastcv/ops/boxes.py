"""Geometry of boxes: area, conversion between formats, clipping, filtering, boxes of masks."""

from __future__ import annotations

import torch
from torch import Tensor

from ._box_convert import AXIS_ALIGNED_COLUMNS, CONVERSIONS, ROTATED_COLUMNS
from ._checks import check_tensor

__all__ = [
    "box_area",
    "box_convert",
    "clip_boxes_to_image",
    "masks_to_boxes",
    "remove_small_boxes",
]


def check_boxes(name: str, boxes: Tensor, columns: int, at_least: bool = False) -> None:
    """Raise unless ``boxes`` is a tensor whose last dimension is ``columns`` (or more)."""
    check_tensor(name, boxes)
    given = boxes.shape[-1] if boxes.ndim else 0
    if given < columns or (given > columns and not at_least):
        expected = f"{'at least ' if at_least else ''}{columns}"
        raise ValueError(f"{name}: expected a last dimension of {expected}, got shape {list(boxes.shape)}")


def _without_overflow(boxes: Tensor) -> Tensor:
    """The same values in a type wide enough for differences and products of coordinates."""
    if boxes.is_floating_point():
        return boxes.float() if boxes.dtype.itemsize < 4 else boxes
    return boxes if boxes.dtype in (torch.int32, torch.int64) else boxes.int()


def box_area(boxes: Tensor, fmt: str = "xyxy") -> Tensor:
    """Area of axis-aligned boxes: width times height, signed where a box is inverted.

    Args:
        boxes: ``[..., 4]``, any real type. Columns after the fourth are ignored.
        fmt: "xyxy", "xywh" or "cxcywh".

    Returns:
        ``[...]``. float16 and bfloat16 give float32; integers narrower than 32 bits give int32;
        other types are kept.

    Raises:
        TypeError: ``boxes`` is not a tensor.
        ValueError: ``fmt`` is unknown or rotated, or the last dimension is less than 4.

    Example:
        >>> import torch, fastcv
        >>> fastcv.ops.box_area(torch.tensor([[0.0, 0.0, 2.0, 3.0], [1.0, 1.0, 1.0, 5.0]]))
        tensor([6., 0.])
    """
    if fmt not in AXIS_ALIGNED_COLUMNS:
        raise ValueError(f"fmt: expected one of {tuple(AXIS_ALIGNED_COLUMNS)}, got {fmt!r}")
    check_boxes("boxes", boxes, 4, at_least=True)
    boxes = _without_overflow(boxes)
    if fmt == "xyxy":
        return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    return boxes[..., 2] * boxes[..., 3]


def box_convert(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
    """Convert boxes between the axis-aligned formats, or between the rotated ones.

    Axis-aligned formats, last dimension 4:

    * ``xyxy``: corners (x1, y1) and (x2, y2);
    * ``xywh``: corner (x1, y1), width, height;
    * ``cxcywh``: centre, width, height.

    Rotated formats, last dimension 5, 5 and 8. The angle r is in degrees and turns
    counter-clockwise on the screen, where y points down:

    * ``cxcywhr``: centre, width, height, angle;
    * ``xywhr``: the corner that is top left at angle 0, width, height, angle;
    * ``xyxyxyxy``: the four corners, clockwise on the screen, from that same corner.

    A quadrilateral in ``xyxyxyxy`` is read as the rectangle given by its first three corners: angle
    and width from the first edge, height from the length of the second.

    Args:
        boxes: ``[..., 4]``, ``[..., 5]`` or ``[..., 8]`` as ``in_fmt`` says.
        in_fmt: format of ``boxes``.
        out_fmt: format wanted, of the same family.

    Returns:
        A new tensor ``[..., 4 | 5 | 8]`` of the type of ``boxes``, but float32 where integer boxes
        are converted from or to "cxcywh". Rotated integer boxes are rounded, in "xywhr" and in
        the result. Angles computed from corners lie in [-180, 180] degrees.

    Raises:
        TypeError: ``boxes`` is not a tensor.
        ValueError: a format is unknown, or the last dimension does not fit ``in_fmt``.
        NotImplementedError: one format is axis-aligned and the other rotated.

    Example:
        >>> import torch, fastcv
        >>> fastcv.ops.box_convert(torch.tensor([[1.0, 2.0, 5.0, 9.0]]), "xyxy", "cxcywh")
        tensor([[3.0000, 5.5000, 4.0000, 7.0000]])
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 2.0, 90.0]])
        >>> fastcv.ops.box_convert(boxes, "xywhr", "cxcywhr").round()
        tensor([[ 1., -2.,  4.,  2., 90.]])
    """
    columns = AXIS_ALIGNED_COLUMNS | ROTATED_COLUMNS
    for name, fmt in (("in_fmt", in_fmt), ("out_fmt", out_fmt)):
        if fmt not in columns:
            raise ValueError(f"{name}: expected one of {tuple(columns)}, got {fmt!r}")
    if (in_fmt in ROTATED_COLUMNS) != (out_fmt in ROTATED_COLUMNS):
        raise NotImplementedError(
            f"conversion between axis-aligned and rotated boxes: in_fmt={in_fmt!r}, out_fmt={out_fmt!r}"
        )
    check_boxes("boxes", boxes, columns[in_fmt])
    if in_fmt == out_fmt:
        return boxes.clone()
    to_hub, from_hub = CONVERSIONS[in_fmt][0], CONVERSIONS[out_fmt][1]
    if to_hub is not None:
        boxes = to_hub(boxes)
    return boxes if from_hub is None else from_hub(boxes)


def clip_boxes_to_image(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Move the corners that lie outside an image to its border.

    Args:
        boxes: ``[..., 4]`` in xyxy, or any even number of columns x, y, x, y, ... (polygons).
        size: height and width of the image, not negative.

    Returns:
        A new tensor of the shape of ``boxes``: x within [0, width], y within [0, height].

    Raises:
        TypeError: ``boxes`` is not a tensor.
        ValueError: an odd number of columns, or ``size`` is not two non-negative numbers.

    Example:
        >>> import torch, fastcv
        >>> fastcv.ops.clip_boxes_to_image(torch.tensor([[-3.0, 2.0, 30.0, 40.0]]), (10, 20))
        tensor([[ 0.,  2., 20., 10.]])
    """
    check_boxes("boxes", boxes, 0, at_least=True)
    if boxes.ndim == 0 or boxes.shape[-1] % 2:
        raise ValueError(f"boxes: expected columns in pairs (x, y), got shape {list(boxes.shape)}")
    if len(size) != 2 or size[0] < 0 or size[1] < 0:
        raise ValueError(f"size: expected (height, width), both at least 0, got {size!r}")
    height, width = size
    if boxes.dtype in (torch.uint8, torch.int8, torch.int16):
        largest = torch.iinfo(boxes.dtype).max
        height, width = min(height, largest), min(width, largest)
    x = boxes[..., 0::2].clamp(min=0, max=width)
    y = boxes[..., 1::2].clamp(min=0, max=height)
    return torch.stack((x, y), dim=-1).reshape(boxes.shape)


def remove_small_boxes(boxes: Tensor, min_size: float) -> Tensor:
    """Indices of the boxes whose width and height are both at least ``min_size``.

    Args:
        boxes: ``[N, 4]`` in xyxy. Columns after the fourth are ignored.
        min_size: smallest side kept, in the units of ``boxes``.

    Returns:
        int64 ``[K]``, increasing. A box with a NaN is never kept.

    Raises:
        TypeError: ``boxes`` is not a tensor.
        ValueError: ``boxes`` is not ``[N, 4]``.

    Example:
        >>> import torch, fastcv
        >>> boxes = torch.tensor([[0.0, 0.0, 9.0, 1.0], [0.0, 0.0, 4.0, 3.0]])
        >>> fastcv.ops.remove_small_boxes(boxes, 2.0)
        tensor([1])
    """
    check_boxes("boxes", boxes, 4, at_least=True)
    if boxes.ndim != 2:
        raise ValueError(f"boxes: expected shape [N, 4], got {list(boxes.shape)}")
    if not boxes.is_floating_point():
        boxes = _without_overflow(boxes)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return torch.where((width >= min_size) & (height >= min_size))[0]


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Smallest box around the non-zero pixels of each mask.

    Args:
        masks: ``[N, H, W]``, any type; a pixel belongs to the mask where it is not zero.

    Returns:
        float32 ``[N, 4]`` in xyxy: first and last column, first and last row that hold a pixel,
        both inclusive. A mask without pixels gives a row of zeros. An empty tensor of another
        rank gives ``[0, 4]``.

    Raises:
        TypeError: ``masks`` is not a tensor.
        ValueError: ``masks`` is neither ``[N, H, W]`` nor empty.

    Example:
        >>> import torch, fastcv
        >>> mask = torch.zeros(1, 5, 6)
        >>> mask[0, 1:3, 2:6] = 1
        >>> fastcv.ops.masks_to_boxes(mask)
        tensor([[2., 1., 5., 2.]])
    """
    check_tensor("masks", masks)
    if masks.numel() == 0:
        count = masks.shape[0] if masks.ndim == 3 else 0
        return torch.zeros((count, 4), dtype=torch.float32, device=masks.device)
    if masks.ndim != 3:
        raise ValueError(f"masks: expected shape [N, H, W], got {list(masks.shape)}")
    if not masks.is_floating_point() and masks.dtype is not torch.uint8:
        masks = masks.bool().view(torch.uint8)  # bytes, because maxima of bool are slow
    x1, x2 = _first_and_last(_any(masks, dim=1))
    y1, y2 = _first_and_last(_any(masks, dim=2))
    return torch.stack((x1, y1, x2, y2), dim=-1).float()


def _any(masks: Tensor, dim: int) -> Tensor:
    """``masks.any(dim)``, faster and without a copy of floating masks as bool."""
    present = masks.amax(dim) != 0
    return present | (masks.amin(dim) != 0) if masks.is_floating_point() else present


def _first_and_last(present: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first and the last true entry of each row ``[N, L]``; 0 and 0 where none is."""
    length = present.shape[-1]
    index = torch.arange(length, device=present.device)
    last = torch.where(present, index, 0).amax(dim=-1)
    first = torch.where(present, index, length).amin(dim=-1)
    return torch.where(present.any(dim=-1), first, 0), last
