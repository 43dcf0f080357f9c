"""Non-maximum suppression: ``nms``, ``batched_nms``, ``nms_padded``.

Defined on every path alike:

* scores are compared from high to low; equal scores go to the lowest index;
* a box is suppressed when its IoU with a better, kept box is **greater than** the threshold;
* a box or score with NaN is never kept and never suppresses another;
* boxes of no area, inverted boxes and boxes with an infinite coordinate or area overlap nothing (their IoU is 0 or
  NaN): they are kept and suppress nothing;
* float16 and bfloat16 boxes are compared in float32, and boxes and scores may differ in type.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define
from ._checks import (
    check_boxes_and_scores,
    check_floating,
    check_same_device,
    check_shape,
    check_threshold,
    class_ids,
)

IoUType = Literal["iou", "diou"]

define(
    "nms(Tensor boxes, Tensor scores, float iou_threshold, bool diou=False) -> Tensor",
    reference.nms.nms,
    triton=True,
)
define(
    "batched_nms(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold, bool diou=False) -> Tensor",
    reference.nms.batched_nms,
    triton=True,
)
define(
    "nms_padded(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, SymInt max_output, "
    "float score_threshold, bool diou=False) -> (Tensor, Tensor, Tensor)",
    reference.nms.nms_padded,
    triton=True,
)


def _is_diou(iou_type: str) -> bool:
    if iou_type not in ("iou", "diou"):
        raise ValueError(f'iou_type: expected "iou" or "diou", got {iou_type!r}')
    return iou_type == "diou"


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, iou_type: IoUType = "iou") -> Tensor:
    """Greedy non-maximum suppression: keep the best box, drop all that overlap it too much, repeat.

    Args:
        boxes: ``[N, 4]`` as ``(x1, y1, x2, y2)``, any floating type.
        scores: ``[N]``, any floating type.
        iou_threshold: boxes with IoU greater than this (usually 0 to 1) to a kept box are dropped.
        iou_type: ``"iou"``, or ``"diou"`` to suppress by distance-IoU: the IoU minus the squared distance of the
            centres over the squared diagonal of the enclosing box (Zheng et al., "Distance-IoU Loss", AAAI 2020,
            section 3.3).

    Returns:
        int64 ``[K]``: indices of the boxes kept, by decreasing score.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or device.

    Example:
        >>> import torch, fastcv
        >>> boxes = torch.tensor([[0., 0., 10., 10.], [1., 1., 10., 10.], [20., 20., 30., 30.]])
        >>> fastcv.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
        tensor([0, 2])
    """
    check_boxes_and_scores(boxes, scores)
    check_threshold("iou_threshold", iou_threshold)
    return torch.ops.fastcv.nms(boxes, scores, iou_threshold, _is_diou(iou_type))


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    *,
    iou_type: IoUType = "iou",
) -> Tensor:
    """Non-maximum suppression within each class; boxes of different classes never suppress each other.

    Class ids are compared as integers and coordinates are never shifted, so the result is the union of :func:`nms` over
    the classes for any coordinates (negative ones too), any ids and any floating type.

    Args:
        boxes: ``[N, 4]`` as ``(x1, y1, x2, y2)``, any floating type.
        scores: ``[N]``, any floating type.
        idxs: ``[N]``, the class id of each box: any integer type, or a floating type whose values are compared exactly.
        iou_threshold: boxes with IoU greater than this to a kept box of their class are dropped.
        iou_type: ``"iou"`` or ``"diou"``, as in :func:`nms`.

    Returns:
        int64 ``[K]``: indices of the boxes kept, by decreasing score.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or device.

    Example:
        >>> import torch, fastcv
        >>> boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 10.]])
        >>> fastcv.ops.batched_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), 0.5)
        tensor([0, 1])
    """
    check_boxes_and_scores(boxes, scores)
    check_threshold("iou_threshold", iou_threshold)
    idxs = class_ids(idxs, (boxes.shape[0],), boxes)
    return torch.ops.fastcv.batched_nms(boxes, scores, idxs, iou_threshold, _is_diou(iou_type))


class PaddedDetections(NamedTuple):
    """The result of :func:`nms_padded`; rows beyond ``counts`` hold -1."""

    indices: Tensor
    """int64 ``[B, max_output]``: which of the N boxes, by decreasing score."""
    labels: Tensor
    """int64 ``[B, max_output]``: its class."""
    counts: Tensor
    """int64 ``[B]``: how many of the rows hold a detection."""


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_output: int,
    *,
    idxs: Tensor | None = None,
    score_threshold: float | None = None,
    iou_type: IoUType = "iou",
) -> PaddedDetections:
    """Class-wise non-maximum suppression of a batch of images in one call, with an output of fixed size.

    The output's shape does not depend on the data: a detector that ends with it compiles, exports and vmaps.

    Args:
        boxes: ``[B, N, 4]`` as ``(x1, y1, x2, y2)``, shared by the classes.
        scores: ``[B, N]`` (one class, or the classes in ``idxs``) or ``[B, C, N]`` (every box competes in every class).
        iou_threshold: boxes with IoU greater than this to a kept box of their class are dropped.
        max_output: detections kept per image, over all classes.
        idxs: with scores ``[B, N]``: class ids ``[B, N]``, any integer type.
        score_threshold: only scores greater than this (rounded to float32 where scores are not float64, as in
            ``scores > score_threshold``) take part; None admits all.
        iou_type: ``"iou"`` or ``"diou"``, as in :func:`nms`.

    Returns:
        :class:`PaddedDetections`: ``indices`` and ``labels`` int64 ``[B, max_output]`` by decreasing score (ties:
        lowest class, then lowest index; with ``idxs`` lowest index), padded with -1, and ``counts`` int64 ``[B]``.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or device.

    Example:
        >>> import torch, fastcv
        >>> boxes = torch.tensor([[[0., 0., 10., 10.], [1., 1., 10., 10.], [20., 20., 30., 30.]]])
        >>> fastcv.ops.nms_padded(boxes, torch.tensor([[0.9, 0.8, 0.7]]), 0.5, max_output=4).indices
        tensor([[ 0,  2, -1, -1]])
    """
    check_floating("boxes", boxes)
    check_floating("scores", scores)
    check_shape("boxes", boxes, ("B", "N", 4))
    images, n = boxes.shape[:2]
    check_shape("scores", scores, (images, "C", n) if scores.dim() == 3 else (images, n))
    check_same_device("scores", scores, "boxes", boxes)
    check_threshold("iou_threshold", iou_threshold)
    if not isinstance(max_output, (int, torch.SymInt)) or max_output < 0:
        raise ValueError(f"max_output: expected an int of at least 0, got {max_output!r}")
    if idxs is not None:
        if scores.dim() == 3:
            raise ValueError("idxs: expected None with scores of shape [B, C, N]")
        check_shape("idxs", idxs, (images, n))
        if idxs.is_floating_point() or idxs.is_complex():
            raise TypeError(f"idxs: expected an integer type, got {idxs.dtype}")
        check_same_device("idxs", idxs, "boxes", boxes)
    threshold = float("-inf") if score_threshold is None else score_threshold
    check_threshold("score_threshold", threshold)
    return PaddedDetections(
        *torch.ops.fastcv.nms_padded(boxes, scores, idxs, iou_threshold, max_output, threshold, _is_diou(iou_type))
    )


# ---- fake kernels, vmap --------------------------------------------------------------------------


@torch.library.register_fake("fastcv::nms", lib=LIBRARY)
def _(boxes, scores, iou_threshold, diou=False):
    check_boxes_and_scores(boxes, scores)
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@torch.library.register_fake("fastcv::batched_nms", lib=LIBRARY)
def _(boxes, scores, idxs, iou_threshold, diou=False):
    check_boxes_and_scores(boxes, scores)
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@torch.library.register_fake("fastcv::nms_padded", lib=LIBRARY)
def _(boxes, scores, idxs, iou_threshold, max_output, score_threshold, diou=False):
    indices = boxes.new_empty((boxes.shape[0], max_output), dtype=torch.int64)
    return indices, torch.empty_like(indices), boxes.new_empty(boxes.shape[0], dtype=torch.int64)


def _no_vmap(info, in_dims, *args):
    raise RuntimeError(
        "vmap over nms would give results of different lengths: use fastcv.ops.nms_padded, whose output size is fixed"
    )


for _name in ("nms", "batched_nms"):
    torch.library.register_vmap(f"fastcv::{_name}", _no_vmap, lib=LIBRARY)


def _nms_padded_vmap(info, in_dims, boxes, scores, idxs, iou_threshold, max_output, score_threshold, diou=False):
    """The mapped dimension joins the images: one call for all."""

    def fold(value, dim):
        if value is None:
            return None
        value = value.movedim(dim, 0) if dim is not None else value.expand(info.batch_size, *value.shape)
        return value.flatten(0, 1)

    results = torch.ops.fastcv.nms_padded(
        fold(boxes, in_dims[0]), fold(scores, in_dims[1]), fold(idxs, in_dims[2]),
        iou_threshold, max_output, score_threshold, diou,
    )  # fmt: skip
    return tuple(r.unflatten(0, (info.batch_size, -1)) for r in results), (0, 0, 0)


torch.library.register_vmap("fastcv::nms_padded", _nms_padded_vmap, lib=LIBRARY)
