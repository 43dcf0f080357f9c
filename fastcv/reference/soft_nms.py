"""Soft-NMS in plain PyTorch: the specification of ``csrc/soft_nms``."""

from __future__ import annotations

import torch
from torch import Tensor

from .nms import _accumulate, _overlap


def _factor(iou: Tensor, iou_threshold: float, sigma: float, method: str) -> Tensor:
    """What a score is multiplied by, given the IoU with the box just chosen."""
    if method == "gaussian":
        return torch.where(iou > 0, torch.exp(-(iou**2) / sigma), 1.0)
    above = iou.double() > iou_threshold
    return torch.where(above, 0.0 if method == "naive" else 1 - iou, 1.0)


def _one_class(
    boxes: Tensor, scores: Tensor, iou_threshold: float, sigma: float, threshold: float, method: str
) -> tuple[Tensor, Tensor]:
    """Chosen rows and their scores when chosen."""
    rows = ((scores > threshold) & ~boxes.isnan().any(1)).nonzero()[:, 0]
    boxes, scores = boxes[rows], scores[rows]
    chosen, chosen_scores = [], []
    while rows.numel():
        best = int((scores == scores.max()).nonzero()[0])
        chosen.append(rows[best])
        chosen_scores.append(scores[best])
        scores = scores * _factor(_overlap(boxes[best], boxes, False), iou_threshold, sigma, method)
        left = scores > threshold
        left[best] = False
        boxes, scores, rows = boxes[left], scores[left], rows[left]
    if not chosen:
        return rows, scores
    return torch.stack(chosen), torch.stack(chosen_scores)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    method: str,
) -> tuple[Tensor, Tensor]:
    dtype = scores.dtype
    boxes, scores = _accumulate(boxes, scores)
    classes = torch.zeros_like(scores) if idxs is None else idxs
    final = torch.full_like(scores, -1)
    for class_id in classes.unique():
        rows = (classes == class_id).nonzero()[:, 0]
        chosen, chosen_scores = _one_class(boxes[rows], scores[rows], iou_threshold, sigma, score_threshold, method)
        final[rows[chosen]] = chosen_scores
    rows = (final > 0).nonzero()[:, 0]
    rows = rows[torch.argsort(final[rows], descending=True, stable=True)]
    return rows, final[rows].to(dtype)
