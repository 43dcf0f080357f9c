"""Intersection over union of every box with every other, and its variants GIoU, DIoU and CIoU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define
from ._autograd import needs_derivatives
from ._box_convert import AXIS_ALIGNED_COLUMNS, ROTATED_COLUMNS
from .boxes import box_convert, check_boxes

define(
    "box_iou_rotated(Tensor boxes1, Tensor boxes2, bool wide) -> Tensor",
    reference.box_iou_rotated.in_float,
    triton=True,
)

__all__ = ["box_iou", "complete_box_iou", "distance_box_iou", "generalized_box_iou"]


def box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy") -> Tensor:
    """Intersection over union of every box of ``boxes1`` with every box of ``boxes2``.

    Two boxes whose union has no area have IoU 0 (``torchvision`` gives NaN for axis-aligned ones).
    A NaN in a box gives NaN. Rotated boxes: the intersection is computed in float64 (float32 on
    devices without it), lies within [0, area of either box], and is differentiable; boxes with a
    side of length 0 or infinity, or with one negative side, overlap nothing.

    Args:
        boxes1: ``[..., N, 4]``, any real type; for rotated formats ``[N, 5]`` or ``[N, 8]``.
        boxes2: ``[..., M, 4]``; leading dimensions broadcast. Rotated: ``[M, 5]`` or ``[M, 8]``.
        fmt: "xyxy", "xywh", "cxcywh", or rotated "cxcywhr", "xywhr", "xyxyxyxy", as in
            :func:`box_convert`. Angles are in degrees. A quadrilateral in "xyxyxyxy" is read as a
            rectangle by its first three corners, which must run clockwise on the screen.

    Returns:
        ``[..., N, M]`` in [0, 1]: float64 if a float64 tensor is given, else float32.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: ``fmt`` is unknown, or a shape does not fit it.

    Example:
        >>> import torch, fastcv
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0]])
        >>> fastcv.ops.box_iou(boxes, boxes[:1])
        tensor([[1.0000],
                [0.3333]])
    """
    if fmt in ROTATED_COLUMNS:
        return _rotated(boxes1, boxes2, fmt)
    if fmt not in AXIS_ALIGNED_COLUMNS:
        known = (*AXIS_ALIGNED_COLUMNS, *ROTATED_COLUMNS)
        raise ValueError(f"fmt: expected one of {known}, got {fmt!r}")
    boxes1, boxes2 = _pairs(boxes1, boxes2, fmt)
    return ratio(*intersection_and_union(boxes1, boxes2))


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """GIoU of every pair: IoU minus the part of the smallest enclosing box that neither covers.

    Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019, algorithm 1. Where the
    enclosing box has no area that part counts as 0 (``torchvision`` gives NaN or infinity).

    Args:
        boxes1: ``[..., N, 4]`` in xyxy, any real type.
        boxes2: ``[..., M, 4]`` in xyxy; leading dimensions broadcast.

    Returns:
        ``[..., N, M]`` in [-1, 1]: float64 if a float64 tensor is given, else float32.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape is not ``[..., 4]``.

    Example:
        >>> import torch, fastcv
        >>> boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [3.0, 0.0, 4.0, 1.0]])
        >>> fastcv.ops.generalized_box_iou(boxes[:1], boxes)
        tensor([[ 1.0000, -0.5000]])
    """
    boxes1, boxes2 = _pairs(boxes1, boxes2)
    overlap, union = intersection_and_union(boxes1, boxes2)
    width, height = _proper_enclosing_size(boxes1, boxes2)
    hull = width * height
    return ratio(overlap, union) - ratio(hull - union, hull)


def distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """DIoU of every pair: IoU minus the squared distance of the centres in units of the diagonal.

    Zheng et al., "Distance-IoU Loss", AAAI 2020, equation 7: the diagonal is that of the smallest
    enclosing box. The IoU of two boxes whose union has no area is 0 (``torchvision``: NaN).

    Args:
        boxes1: ``[..., N, 4]`` in xyxy, any real type.
        boxes2: ``[..., M, 4]`` in xyxy; leading dimensions broadcast.
        eps: added to the squared diagonal.

    Returns:
        ``[..., N, M]`` in [-1, 1]: float64 if a float64 tensor is given, else float32.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape is not ``[..., 4]``.

    Example:
        >>> import torch, fastcv
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 4.0, 2.0]])
        >>> fastcv.ops.distance_box_iou(boxes[:1], boxes)
        tensor([[ 1.0000, -0.2000]])
    """
    boxes1, boxes2 = _pairs(boxes1, boxes2)
    iou = ratio(*intersection_and_union(boxes1, boxes2))
    return iou - centre_distance(boxes1, boxes2, _proper_enclosing_size(boxes1, boxes2), eps)


def complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """CIoU of every pair: DIoU minus a penalty for different aspect ratios.

    Zheng et al., "Distance-IoU Loss", AAAI 2020, equations 8 to 11; the weight of the penalty is
    not differentiated. A box of width and height 0 counts as infinitely narrow, so the result is
    finite (``torchvision``: NaN).

    Args:
        boxes1: ``[..., N, 4]`` in xyxy, any real type.
        boxes2: ``[..., M, 4]`` in xyxy; leading dimensions broadcast.
        eps: added to the squared diagonal and to the denominator of the weight.

    Returns:
        ``[..., N, M]`` in [-1.5, 1]: float64 if a float64 tensor is given, else float32.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape is not ``[..., 4]``.

    Example:
        >>> import torch, fastcv
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 4.0]])
        >>> fastcv.ops.complete_box_iou(boxes[:1], boxes)
        tensor([[1.0000, 0.4468]])
    """
    boxes1, boxes2 = _pairs(boxes1, boxes2)
    iou = ratio(*intersection_and_union(boxes1, boxes2))
    distance = centre_distance(boxes1, boxes2, _proper_enclosing_size(boxes1, boxes2), eps)
    return iou - distance - aspect_penalty(boxes1, boxes2, iou, eps)


# ---- shared with the losses: boxes [..., 4] which broadcast against each other -------------------


def intersection_and_union(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Areas ``[...]``; an inverted box intersects nothing and has a signed area in the union."""
    ax1, ay1, ax2, ay2 = boxes1.unbind(-1)
    bx1, by1, bx2, by2 = boxes2.unbind(-1)
    width = torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)
    height = torch.minimum(ay2, by2) - torch.maximum(ay1, by1)
    overlap = width.clamp(min=0) * height.clamp(min=0)
    return overlap, (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole``, and 0 with zero derivatives where ``whole`` is 0."""
    nothing = whole == 0
    return torch.where(nothing, 0, part) / torch.where(nothing, 1, whole)


def enclosing_size(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Width and height of the smallest box around both; negative if both are inverted."""
    ax1, ay1, ax2, ay2 = boxes1.unbind(-1)
    bx1, by1, bx2, by2 = boxes2.unbind(-1)
    width = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    return width, torch.maximum(ay2, by2) - torch.minimum(ay1, by1)


def centre_distance(boxes1: Tensor, boxes2: Tensor, enclosing: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """Squared distance of the centres over the squared diagonal of the enclosing box."""
    ax1, ay1, ax2, ay2 = boxes1.unbind(-1)
    bx1, by1, bx2, by2 = boxes2.unbind(-1)
    dx, dy = ((ax1 + ax2) - (bx1 + bx2)) / 2, ((ay1 + ay2) - (by1 + by2)) / 2
    width, height = enclosing
    return (dx * dx + dy * dy) / (width * width + height * height + eps)


def aspect_penalty(boxes1: Tensor, boxes2: Tensor, iou: Tensor, eps: float) -> Tensor:
    """``alpha * v`` of CIoU; ``alpha`` is a constant for the derivatives."""
    v = (4 / math.pi**2) * (_aspect_angle(boxes1) - _aspect_angle(boxes2)) ** 2
    with torch.no_grad():
        alpha = v / (1 - iou + v + eps)
    return alpha * v


def _aspect_angle(boxes: Tensor) -> Tensor:
    """``atan(width / height)``, and 0 with finite derivatives for a box that is a point."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    width = torch.where(height < 0, -width, width)  # atan2 must not leave [-pi/2, pi/2]
    point = (width == 0) & (height == 0)
    return torch.atan2(width, torch.where(point, 1, height.abs()))


def _proper_enclosing_size(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    width, height = enclosing_size(boxes1, boxes2)
    return width.clamp(min=0), height.clamp(min=0)


# ---- arguments -----------------------------------------------------------------------------------


def common_type(boxes1: Tensor, boxes2: Tensor) -> torch.dtype:
    """float64 if one of them is, else float32: what the arithmetic and the result use."""
    return torch.float64 if torch.float64 in (boxes1.dtype, boxes2.dtype) else torch.float32


def _pairs(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy") -> tuple[Tensor, Tensor]:
    """Checked xyxy boxes as ``[..., N, 1, 4]`` and ``[..., 1, M, 4]`` in the type to compute in."""
    check_boxes("boxes1", boxes1, 4)
    check_boxes("boxes2", boxes2, 4)
    dtype = common_type(boxes1, boxes2)
    if boxes2.ndim < 2:
        raise ValueError(f"boxes2: expected shape [..., M, 4], got {list(boxes2.shape)}")
    boxes1 = box_convert(boxes1.to(dtype), fmt, "xyxy") if fmt != "xyxy" else boxes1.to(dtype)
    boxes2 = box_convert(boxes2.to(dtype), fmt, "xyxy") if fmt != "xyxy" else boxes2.to(dtype)
    return boxes1.unsqueeze(-2), boxes2.unsqueeze(-3)


def _rotated(boxes1: Tensor, boxes2: Tensor, fmt: str) -> Tensor:
    for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
        check_boxes(name, boxes, ROTATED_COLUMNS[fmt])
        if boxes.ndim != 2:
            expected = f"[{'N' if name == 'boxes1' else 'M'}, {ROTATED_COLUMNS[fmt]}]"
            raise ValueError(f"{name}: expected shape {expected}, got {list(boxes.shape)}")
    compute = torch.float32 if boxes1.device.type == "mps" else torch.float64
    wide1 = box_convert(boxes1.to(compute), fmt, "cxcywhr")
    wide2 = box_convert(boxes2.to(compute), fmt, "cxcywhr")
    dtype = common_type(boxes1, boxes2)
    plain = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None
    if compute is torch.float64 and plain and not needs_derivatives(wide1, wide2):
        return torch.ops.fastcv.box_iou_rotated(wide1, wide2, dtype is torch.float64)
    return reference.box_iou_rotated.box_iou_rotated(wide1, wide2, dtype)


@torch.library.register_fake("fastcv::box_iou_rotated", lib=LIBRARY)
def _(boxes1, boxes2, wide):
    return boxes1.new_empty((boxes1.shape[0], boxes2.shape[0]), dtype=torch.float64 if wide else torch.float32)
