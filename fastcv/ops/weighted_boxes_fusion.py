"""Weighted boxes fusion: the boxes of several models, or of one model on several views, made one
set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define
from ._checks import (
    check_floating,
    check_one_of,
    check_same_device,
    check_shape,
    check_tensor,
    check_threshold,
)

ConfType = Literal["avg", "max", "box_and_model_avg", "absent_model_aware_avg"]

define(
    "weighted_boxes_fusion(Tensor boxes, Tensor scores, Tensor labels, SymInt[] counts, float[] weights, "
    "float iou_threshold, float skip_threshold, str conf_type, bool allows_overflow) -> (Tensor, Tensor, Tensor)",
    reference.weighted_boxes_fusion.weighted_boxes_fusion,
    triton=True,
)


def weighted_boxes_fusion(
    boxes_list: Sequence[Tensor],
    scores_list: Sequence[Tensor],
    labels_list: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    iou_thr: float = 0.55,
    skip_box_thr: float = 0.0,
    conf_type: ConfType = "avg",
    allows_overflow: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fuse the boxes of M models: boxes of one label that overlap are averaged, weighted by score.

    Solovyev et al., "Weighted boxes fusion: Ensembling boxes from different object detection
    models", Image and Vision Computing 2021, section 3. From the highest weighted score down, each
    box joins the cluster whose mean box has the greatest IoU with it, if that is greater than
    ``iou_thr``, or opens a new one; the mean box is ``sum(score * box) / sum(score)``.

    Arguments and results are those of the package ``ensemble-boxes``, for tensors, with these
    differences: boxes may be in any units, as they are **not clipped to [0, 1]**; boxes of no area,
    inverted, infinite or NaN boxes and negative, infinite or NaN scores are skipped (there, corners
    are swapped); equal scores go to the first box; a cluster whose scores are all 0 keeps its first
    box; labels are integers; wrong arguments raise.

    Args:
        boxes_list: M tensors ``[N_i, 4]`` as ``(x1, y1, x2, y2)``, any floating type, all in the
            same units.
        scores_list: M tensors ``[N_i]``, any floating type, at least 0.
        labels_list: M tensors ``[N_i]`` of an integer type.
        weights: M numbers, at least 0 and not all 0, by which the scores of each model are
            multiplied; None: 1 each.
        iou_thr: usually 0 to 1.
        skip_box_thr: at least 0; boxes with a lower score (before weighting) are skipped.
        conf_type: the score of a cluster of n boxes:

            * ``"avg"``: their mean weighted score, times ``min(M, n) / sum(weights)``;
            * ``"max"``: the greatest weighted score, over the greatest weight;
            * ``"box_and_model_avg"``: the sum of weighted scores over the sum of their weights,
              times the weight of the models that are present over that of all; 0 where they have none;
            * ``"absent_model_aware_avg"``: the sum of weighted scores over the sum of their weights
              and of the weights of the models that are absent.
        allows_overflow: with ``"avg"``: ``n`` in place of ``min(M, n)``, which may give scores
            above 1.

    Returns:
        ``(boxes, scores, labels)``: ``[K, 4]``, ``[K]`` and ``[K]`` in the types of the arguments,
        by decreasing score. **Not differentiable**: gradients do not flow to boxes or scores.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device, length or range.

    All is computed in float64.

    Example:
        >>> import torch, fastcv
        >>> boxes = [torch.tensor([[0., 0., 10., 10.], [50., 50., 60., 60.]]), torch.tensor([[0., 0., 10., 8.]])]
        >>> scores = [torch.tensor([0.9, 0.4]), torch.tensor([0.3])]
        >>> labels = [torch.tensor([1, 1]), torch.tensor([1])]
        >>> for fused in fastcv.ops.weighted_boxes_fusion(boxes, scores, labels):
        ...     fused
        tensor([[ 0.0000,  0.0000, 10.0000,  9.5000],
                [50.0000, 50.0000, 60.0000, 60.0000]])
        tensor([0.6000, 0.2000])
        tensor([1, 1])
    """
    counts = _check_lists(boxes_list, scores_list, labels_list)
    weights = _check_weights(weights, len(counts))
    check_threshold("iou_thr", iou_thr)
    check_threshold("skip_box_thr", skip_box_thr)
    if not skip_box_thr >= 0:
        raise ValueError(f"skip_box_thr: expected at least 0, got {skip_box_thr}")
    check_one_of("conf_type", conf_type, ConfType.__args__)
    boxes, scores, labels = (torch.cat(list(x)) for x in (boxes_list, scores_list, labels_list))
    return torch.ops.fastcv.weighted_boxes_fusion(
        boxes.detach(), scores.detach(), labels, counts, weights, iou_thr, skip_box_thr, conf_type, allows_overflow,
    )  # fmt: skip


def _check_lists(
    boxes_list: Sequence[Tensor], scores_list: Sequence[Tensor], labels_list: Sequence[Tensor]
) -> list[int]:
    """The number of boxes of each model."""
    if isinstance(boxes_list, Tensor) or len(boxes_list) == 0:
        raise ValueError("boxes_list: expected a list of at least one tensor, one for each model")
    for name, values in (("scores_list", scores_list), ("labels_list", labels_list)):
        if isinstance(values, Tensor) or len(values) != len(boxes_list):
            raise ValueError(f"{name}: expected a list of {len(boxes_list)} tensors, one for each model")
    for i, (boxes, scores, labels) in enumerate(zip(boxes_list, scores_list, labels_list, strict=True)):
        check_floating(f"boxes_list[{i}]", boxes)
        check_floating(f"scores_list[{i}]", scores)
        check_tensor(f"labels_list[{i}]", labels)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels_list[{i}]: expected an integer type, got {labels.dtype}")
        check_shape(f"boxes_list[{i}]", boxes, ("N", 4))
        for name, value in (("scores_list", scores), ("labels_list", labels)):
            check_shape(f"{name}[{i}]", value, (boxes.shape[0],))
            check_same_device(f"{name}[{i}]", value, "boxes_list[0]", boxes_list[0])
        check_same_device(f"boxes_list[{i}]", boxes, "boxes_list[0]", boxes_list[0])
    return [boxes.shape[0] for boxes in boxes_list]


def _check_weights(weights: Sequence[float] | None, models: int) -> list[float]:
    if weights is None:
        return [1.0] * models
    weights = [float(w) for w in weights]
    if len(weights) != models:
        raise ValueError(f"weights: expected {models} numbers, one for each model, got {len(weights)}")
    if not all(0 <= w < math.inf for w in weights) or not sum(weights) > 0:
        raise ValueError(f"weights: expected numbers of at least 0, not all 0, got {weights}")
    return weights


@torch.library.register_fake("fastcv::weighted_boxes_fusion", lib=LIBRARY)
def _(boxes, scores, labels, counts, weights, iou_thr, skip_thr, conf_type, allows_overflow):
    fused = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(fused, 4), scores.new_empty(fused), labels.new_empty(fused)


def _no_vmap(info, in_dims, *args):
    raise RuntimeError(
        "vmap over weighted_boxes_fusion would give results of different lengths: loop over the images, or give all of "
        "them in one call with labels = image * classes + class"
    )


torch.library.register_vmap("fastcv::weighted_boxes_fusion", _no_vmap, lib=LIBRARY)
