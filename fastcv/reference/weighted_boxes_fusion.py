"""Weighted boxes fusion in plain PyTorch, in float64: the specification of
``csrc/weighted_boxes_fusion``."""

from __future__ import annotations

import torch
from torch import Tensor

from .nms import _overlap


def _score(scores: Tensor, models: Tensor, weights: Tensor, conf_type: str, allows_overflow: bool) -> Tensor:
    """The score of a cluster from the weighted scores of its boxes and the models they are from."""
    present = weights[models.unique()].sum()
    if conf_type == "max":
        return scores.max() / weights.max()
    if conf_type == "box_and_model_avg":
        total = weights[models].sum()
        return scores.sum() / total * present / weights.sum() if total > 0 else total
    if conf_type == "absent_model_aware_avg":
        return scores.sum() / (weights[models].sum() + weights.sum() - present)
    count = scores.numel() if allows_overflow else min(scores.numel(), weights.numel())
    return scores.mean() * count / weights.sum()


def _cluster(boxes: Tensor, scores: Tensor, iou_threshold: float) -> tuple[list[list[int]], Tensor]:
    """Places of the boxes of each cluster, and their mean boxes, for boxes of one class by
    score."""
    clusters: list[list[int]] = []
    means = boxes[:0]
    for i in range(boxes.shape[0]):
        iou = _overlap(boxes[i], means, False)
        best = int((iou == iou.max()).nonzero()[0]) if clusters else -1
        if best < 0 or not iou[best] > iou_threshold:
            clusters.append([i])
            means = torch.cat([means, boxes[i : i + 1]])
            continue
        clusters[best].append(i)
        weight = scores[clusters[best]]
        if weight.sum() > 0:
            means[best] = (weight[:, None] * boxes[clusters[best]]).sum(0) / weight.sum()
    return clusters, means


def weighted_boxes_fusion(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    counts: list[int],
    weights: list[float],
    iou_threshold: float,
    skip_threshold: float,
    conf_type: str,
    allows_overflow: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes = boxes.dtype, scores.dtype
    half = scores.dtype in (torch.float16, torch.bfloat16)
    admitted = (scores.float() if half else scores) >= skip_threshold
    boxes, scores = boxes.double(), scores.double()
    weight = torch.tensor(weights, dtype=torch.float64, device=boxes.device)
    models = torch.repeat_interleave(torch.tensor(counts, device=boxes.device))
    scores = scores * weight[models]
    sides = boxes[:, 2:] - boxes[:, :2]
    area = sides.prod(1)
    admitted &= (sides > 0).all(1) & (area > 0) & area.isfinite() & (scores >= 0) & scores.isfinite()
    fused = torch.zeros_like(boxes)  # written at the row of the first box of each cluster
    fused_scores = torch.full_like(scores, -1)
    for label in labels[admitted].unique():
        rows = (admitted & (labels == label)).nonzero()[:, 0]
        rows = rows[torch.argsort(scores[rows], descending=True, stable=True)]
        clusters, means = _cluster(boxes[rows], scores[rows], iou_threshold)
        for cluster, mean in zip(clusters, means, strict=True):
            members = rows[cluster]
            fused[members[0]] = mean
            fused_scores[members[0]] = _score(scores[members], models[members], weight, conf_type, allows_overflow)
    rows = (fused_scores >= 0).nonzero()[:, 0]
    rows = rows[torch.argsort(fused_scores[rows], descending=True, stable=True)]
    return fused[rows].to(dtypes[0]), fused_scores[rows].to(dtypes[1]), labels[rows]
