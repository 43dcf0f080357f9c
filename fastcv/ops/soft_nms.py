"""Soft non-maximum suppression: lower the scores of overlapping boxes instead of dropping the
boxes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define
from ._checks import check_boxes_and_scores, check_one_of, check_threshold, class_ids

define(
    "soft_nms(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, float sigma, float score_threshold, "
    "str method) -> (Tensor, Tensor)",
    reference.soft_nms.soft_nms,
    triton=True,
)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    *,
    method: Literal["linear", "gaussian", "naive"] = "linear",
    idxs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy Soft-NMS: choose the box of the highest score, lower the scores of those that overlap
    it, repeat.

    Bodla et al., "Soft-NMS -- Improving Object Detection With One Line of Code", ICCV 2017, section
    3. With ``o`` the IoU of a box with the one just chosen, its score is multiplied by

    * ``"linear"``: ``1 - o`` where ``o > iou_threshold``, else 1 (equation 2);
    * ``"gaussian"``: ``exp(-o^2 / sigma)`` (equation 3; ``iou_threshold`` is not used);
    * ``"naive"``: 0 where ``o > iou_threshold``, else 1: :func:`nms`.

    Args:
        boxes: ``[N, 4]`` as ``(x1, y1, x2, y2)``, any floating type.
        scores: ``[N]``, any floating type. Scores of 0 and below take no part.
        iou_threshold: usually 0 to 1.
        sigma: greater than 0; the smaller, the more a score is lowered.
        score_threshold: at least 0; a box takes part as long as its score is greater than this.
        method: ``"linear"``, ``"gaussian"`` or ``"naive"``.
        idxs: ``[N]``, the class id of each box (any integer type, or a floating type whose values
            are compared exactly): boxes lower the scores of their own class only. None: all are of
            one class.

    Returns:
        ``(indices, scores)``: int64 ``[K]``, the boxes chosen, and ``[K]`` of the type of
        ``scores``, their lowered scores; by decreasing lowered score, ties by index. **Not
        differentiable**: gradients do not flow to ``boxes`` or ``scores``.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device or range.

    Equal scores go to the lowest index. A box or score with NaN is never chosen and lowers no
    other. Boxes of no area, inverted and infinite boxes overlap nothing. float16 and bfloat16 are
    computed in float32.

    Example:
        >>> import torch, fastcv
        >>> boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 5.], [20., 20., 30., 30.]])
        >>> fastcv.ops.soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7]))
        (tensor([0, 2, 1]), tensor([0.9000, 0.7000, 0.4000]))
    """
    check_boxes_and_scores(boxes, scores)
    check_threshold("iou_threshold", iou_threshold)
    check_threshold("sigma", sigma)
    check_threshold("score_threshold", score_threshold)
    check_one_of("method", method, ("linear", "gaussian", "naive"))
    if not sigma > 0:
        raise ValueError(f"sigma: expected a number greater than 0, got {sigma}")
    if not score_threshold >= 0:
        raise ValueError(f"score_threshold: expected at least 0, got {score_threshold} (scores are lowered towards 0)")
    ids = None if idxs is None else class_ids(idxs, (boxes.shape[0],), boxes)
    return torch.ops.fastcv.soft_nms(
        boxes.detach(), scores.detach(), ids, iou_threshold, sigma, score_threshold, method
    )


@torch.library.register_fake("fastcv::soft_nms", lib=LIBRARY)
def _(boxes, scores, idxs, iou_threshold, sigma, score_threshold, method):
    check_boxes_and_scores(boxes, scores)
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(kept, dtype=torch.int64), scores.new_empty(kept)


def _no_vmap(info, in_dims, *args):
    raise RuntimeError(
        "vmap over soft_nms would give results of different lengths: loop over the images, or give all of them in one "
        "call with idxs = image * classes + class; fastcv.ops.matrix_nms has an output of fixed size"
    )


torch.library.register_vmap("fastcv::soft_nms", _no_vmap, lib=LIBRARY)
