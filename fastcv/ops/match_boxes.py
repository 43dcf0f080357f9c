"""Anchors and proposals matched to ground truth: :func:`match_boxes`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define
from ._checks import check_floating, check_same_device, check_shape, check_threshold

define(
    "match_boxes(Tensor gt_boxes, Tensor boxes, float high_threshold, float low_threshold, "
    "bool allow_low_quality_matches) -> Tensor",
    reference.match_boxes.match_boxes,
    triton=True,
)


def match_boxes(
    gt_boxes: Tensor,
    boxes: Tensor,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool = False,
) -> Tensor:
    """For each box the ground truth of the greatest IoU, if that is great enough.

    What detectors of anchors and proposals train on (Ren et al., "Faster R-CNN", NIPS 2015, section 3.1.2). Gives what
    ``torchvision.models.detection._utils.Matcher(high_threshold, low_threshold, allow_low_quality_matches)`` gives for
    ``box_iou(gt_boxes, boxes)``, of which neither the matrix nor anything of its size is made.

    Args:
        gt_boxes: ``[M, 4]`` as ``(x1, y1, x2, y2)``, any floating type.
        boxes: ``[N, 4]``, the same.
        high_threshold: a box of at least this IoU is matched.
        low_threshold: at most ``high_threshold``; a box of less is background, one between the two neither.
        allow_low_quality_matches: also match, whatever its IoU, each box that no other surpasses for some ground truth,
            with its own best ground truth.

    Returns:
        int64 ``[N]``: a row of ``gt_boxes``, -1 for background, -2 between the thresholds. Not differentiable.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device or range.

    IoUs are in float64 if either is, else in float32. Equal ones go to the first ground truth. Without ground truth all
    boxes are background (torchvision raises). Boxes without area and boxes with NaN overlap nothing: IoU 0. A ground
    truth that overlaps no box has greatest IoU 0, so with ``allow_low_quality_matches`` every box is matched that
    does not overlap it, as in torchvision.

    Example:
        >>> import torch, fastcv
        >>> truth = torch.tensor([[0., 0., 10., 10.], [20., 20., 30., 30.]])
        >>> boxes = torch.tensor([[0., 0., 10., 9.], [0., 0., 10., 5.], [0., 0., 10., 3.], [21., 21., 26., 26.]])
        >>> fastcv.ops.match_boxes(truth, boxes, 0.7, 0.4)
        tensor([ 0, -2, -1, -1])
        >>> fastcv.ops.match_boxes(truth, boxes, 0.7, 0.4, allow_low_quality_matches=True)
        tensor([ 0, -2, -1,  1])
    """
    check_floating("gt_boxes", gt_boxes)
    check_floating("boxes", boxes)
    check_shape("gt_boxes", gt_boxes, ("M", 4))
    check_shape("boxes", boxes, ("N", 4))
    check_same_device("gt_boxes", gt_boxes, "boxes", boxes)
    check_threshold("high_threshold", high_threshold)
    check_threshold("low_threshold", low_threshold)
    if not 0 <= low_threshold <= high_threshold:
        raise ValueError(f"low_threshold: expected 0 to high_threshold, {high_threshold}, got {low_threshold}")
    dtype = torch.float64 if torch.float64 in (gt_boxes.dtype, boxes.dtype) else torch.float32
    return torch.ops.fastcv.match_boxes(
        gt_boxes.detach().to(dtype), boxes.detach().to(dtype), high_threshold, low_threshold,
        bool(allow_low_quality_matches),
    )  # fmt: skip


@torch.library.register_fake("fastcv::match_boxes", lib=LIBRARY)
def _(gt_boxes, boxes, high_threshold, low_threshold, allow_low_quality_matches):
    return boxes.new_empty(boxes.shape[0], dtype=torch.int64)
