"""Non-maximum suppression of rotated boxes: :func:`nms_rotated`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define
from ._box_convert import ROTATED_COLUMNS
from ._checks import check_floating, check_one_of, check_same_device, check_shape, check_threshold, class_ids
from .boxes import box_convert

define(
    "nms_rotated(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold) -> Tensor",
    reference.nms_rotated.nms_rotated,
    triton=True,
)


def nms_rotated(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    *,
    idxs: Tensor | None = None,
    fmt: str = "cxcywhr",
) -> Tensor:
    """Greedy non-maximum suppression of rotated boxes: text lines, vehicles seen from above, ships.

    Keeps the best box, drops all whose :func:`box_iou` with it is too great, repeats; the decisions are made in
    float64 whatever the type. (Ma et al., "Arbitrary-oriented scene text detection via rotation proposals", IEEE
    Transactions on Multimedia 20(11), 2018, section IV.)

    Args:
        boxes: ``[N, 5]``, or ``[N, 8]`` for "xyxyxyxy", any floating type.
        scores: ``[N]``, any floating type.
        iou_threshold: boxes with IoU greater than this (usually 0 to 1) to a kept box are dropped.
        idxs: ``[N]``, the class id of each box, of an integer type, or a floating type whose values are compared
            exactly: boxes of different classes never suppress each other. None: all are of one class.
        fmt: "cxcywhr", "xywhr" or "xyxyxyxy", as in :func:`box_convert`; angles in degrees.

    Returns:
        int64 ``[K]``: indices of the boxes kept, by decreasing score, equal scores by index.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device or value.

    A box or score with NaN, or an infinite angle, is never kept and never suppresses another. Boxes with a side of
    length 0 or infinity, or with one negative side, overlap nothing.

    Example:
        >>> import torch, fastcv
        >>> boxes = torch.tensor([[0., 0., 8., 2., 0.], [0., 0., 8., 2., 5.], [0., 0., 8., 2., 90.]])
        >>> fastcv.ops.nms_rotated(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
        tensor([0, 2])
    """
    check_one_of("fmt", fmt, tuple(ROTATED_COLUMNS))
    check_floating("boxes", boxes)
    check_floating("scores", scores)
    check_shape("boxes", boxes, ("N", ROTATED_COLUMNS[fmt]))
    check_shape("scores", scores, (boxes.shape[0],))
    check_same_device("scores", scores, "boxes", boxes)
    check_threshold("iou_threshold", iou_threshold)
    if idxs is not None:
        idxs = class_ids(idxs, (boxes.shape[0],), boxes)
    boxes = box_convert(boxes.detach().double(), fmt, "cxcywhr")
    return torch.ops.fastcv.nms_rotated(boxes, scores.detach(), idxs, iou_threshold)


@torch.library.register_fake("fastcv::nms_rotated", lib=LIBRARY)
def _(boxes, scores, idxs, iou_threshold):
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _no_vmap(info, in_dims, *args):
    raise RuntimeError("vmap over nms_rotated would give results of different lengths")


torch.library.register_vmap("fastcv::nms_rotated", _no_vmap, lib=LIBRARY)
