"""Regression losses for boxes: 1 - GIoU, 1 - DIoU, 1 - CIoU, box by box."""

from __future__ import annotations

from torch import Tensor

from ._reduction import check_reduction, reduce_loss
from .box_iou import (
    aspect_penalty,
    centre_distance,
    common_type,
    enclosing_size,
    intersection_and_union,
)
from .boxes import check_boxes

__all__ = ["complete_box_iou_loss", "distance_box_iou_loss", "generalized_box_iou_loss"]


def generalized_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """``1 - GIoU`` of each box with its partner.

    Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019, algorithm 2. Two equal
    boxes of no area have loss 1.

    Args:
        boxes1: ``[..., 4]`` in xyxy with x1 <= x2 and y1 <= y2, any real type.
        boxes2: the same shape.
        reduction: "none", "mean" or "sum". The mean of no boxes is 0.
        eps: added to the areas divided by.

    Returns:
        ``[...]`` or a scalar, each loss in [0, 2]: float64 if a float64 tensor is given, else
        float32.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape is not ``[..., 4]``, the shapes differ, or ``reduction`` is unknown.

    Example:
        >>> import torch, fastcv
        >>> boxes1 = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        >>> fastcv.ops.generalized_box_iou_loss(boxes1, torch.tensor([[3.0, 0.0, 4.0, 1.0]]))
        tensor([1.5000])
    """
    boxes1, boxes2 = _partners(boxes1, boxes2, reduction)
    overlap, union = intersection_and_union(boxes1, boxes2)
    width, height = enclosing_size(boxes1, boxes2)
    hull = width * height
    loss = 1 - overlap / (union + eps) + (hull - union) / (hull + eps)
    return reduce_loss(loss, reduction)


def distance_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """``1 - DIoU`` of each box with its partner.

    Zheng et al., "Distance-IoU Loss", AAAI 2020, equation 7. Two equal boxes of no area have
    loss 1.

    Args:
        boxes1: ``[..., 4]`` in xyxy with x1 <= x2 and y1 <= y2, any real type.
        boxes2: the same shape.
        reduction: "none", "mean" or "sum". The mean of no boxes is 0.
        eps: added to the union and to the squared diagonal.

    Returns:
        ``[...]`` or a scalar, each loss in [0, 2]: float64 if a float64 tensor is given, else
        float32.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape is not ``[..., 4]``, the shapes differ, or ``reduction`` is unknown.

    Example:
        >>> import torch, fastcv
        >>> boxes1 = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        >>> fastcv.ops.distance_box_iou_loss(boxes1, torch.tensor([[2.0, 0.0, 4.0, 2.0]]))
        tensor([1.2000])
    """
    boxes1, boxes2 = _partners(boxes1, boxes2, reduction)
    overlap, union = intersection_and_union(boxes1, boxes2)
    distance = centre_distance(boxes1, boxes2, enclosing_size(boxes1, boxes2), eps)
    loss = 1 - overlap / (union + eps) + distance
    return reduce_loss(loss, reduction)


def complete_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """``1 - CIoU`` of each box with its partner.

    Zheng et al., "Distance-IoU Loss", AAAI 2020, equations 8 to 11; the weight of the aspect term
    is not differentiated. A box of width and height 0 counts as infinitely narrow, so loss and
    derivatives are finite (``torchvision``: NaN).

    Args:
        boxes1: ``[..., 4]`` in xyxy with x1 <= x2 and y1 <= y2, any real type.
        boxes2: the same shape.
        reduction: "none", "mean" or "sum". The mean of no boxes is 0.
        eps: added to the union, to the squared diagonal and to the denominator of the weight
            (``torchvision`` uses its default for the first two, whatever is given).

    Returns:
        ``[...]`` or a scalar, each loss in [0, 2.5]: float64 if a float64 tensor is given, else
        float32.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape is not ``[..., 4]``, the shapes differ, or ``reduction`` is unknown.

    Example:
        >>> import torch, fastcv
        >>> boxes1 = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        >>> fastcv.ops.complete_box_iou_loss(boxes1, torch.tensor([[0.0, 0.0, 2.0, 4.0]]))
        tensor([0.5532])
    """
    boxes1, boxes2 = _partners(boxes1, boxes2, reduction)
    overlap, union = intersection_and_union(boxes1, boxes2)
    iou = overlap / (union + eps)
    distance = centre_distance(boxes1, boxes2, enclosing_size(boxes1, boxes2), eps)
    loss = 1 - iou + distance + aspect_penalty(boxes1, boxes2, iou, eps)
    return reduce_loss(loss, reduction)


def _partners(boxes1: Tensor, boxes2: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    check_reduction(reduction)
    check_boxes("boxes1", boxes1, 4)
    check_boxes("boxes2", boxes2, 4)
    if boxes1.shape != boxes2.shape:
        raise ValueError(f"boxes2: expected the shape of boxes1, {list(boxes1.shape)}, got {list(boxes2.shape)}")
    dtype = common_type(boxes1, boxes2)
    return boxes1.to(dtype), boxes2.to(dtype)
