"""Greedy non-maximum suppression in plain PyTorch: the specification of ``csrc/nms``."""

from __future__ import annotations

import torch
from torch import Tensor


def _overlap(box: Tensor, others: Tensor, diou: bool) -> Tensor:
    """IoU (or DIoU) of one box [4] with others [N, 4], in torchvision's order of operations."""
    x1, y1, x2, y2 = others.unbind(1)
    bx1, by1, bx2, by2 = box.unbind()
    width = (torch.minimum(x2, bx2) - torch.maximum(x1, bx1)).clamp(min=0)
    height = (torch.minimum(y2, by2) - torch.maximum(y1, by1)).clamp(min=0)
    intersection = width * height
    areas = (x2 - x1) * (y2 - y1)
    overlap = intersection / (areas + (bx2 - bx1) * (by2 - by1) - intersection)
    if diou:
        ex = torch.maximum(x2, bx2) - torch.minimum(x1, bx1)
        ey = torch.maximum(y2, by2) - torch.minimum(y1, by1)
        dx, dy = ((x1 + x2) - (bx1 + bx2)) * 0.5, ((y1 + y2) - (by1 + by2)) * 0.5
        overlap = overlap - (dx * dx + dy * dy) / (ex * ex + ey * ey)
    return overlap


def _accumulate(*tensors: Tensor) -> list[Tensor]:
    double = any(t.dtype == torch.float64 for t in tensors)
    return [t.to(torch.float64 if double else torch.float32) for t in tensors]


def _ranked(boxes: Tensor, scores: Tensor) -> Tensor:
    """Rows without NaN, best score first, ties by row."""
    valid = ~(boxes.isnan().any(1) | scores.isnan())
    rows = valid.nonzero()[:, 0]
    return rows[torch.argsort(scores[rows], descending=True, stable=True)]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, diou: bool = False) -> Tensor:
    boxes, scores = _accumulate(boxes, scores)
    rows = _ranked(boxes, scores)
    kept = []
    while rows.numel():
        best, rows = rows[0], rows[1:]
        kept.append(best)
        rows = rows[~(_overlap(boxes[best], boxes[rows], diou).double() > iou_threshold)]
    return torch.stack(kept) if kept else rows


def batched_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, diou: bool = False
) -> Tensor:
    boxes, scores = _accumulate(boxes, scores)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for class_id in idxs.unique():
        rows = (idxs == class_id).nonzero()[:, 0]
        keep[rows[nms(boxes[rows], scores[rows], iou_threshold, diou)]] = True
    rows = keep.nonzero()[:, 0]
    return rows[torch.argsort(scores[rows], descending=True, stable=True)]


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    max_output: int,
    score_threshold: float = float("-inf"),
    diou: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    boxes, scores = _accumulate(boxes, scores)
    indices = boxes.new_full((boxes.shape[0], max_output), -1, dtype=torch.int64)
    labels, counts = indices.clone(), indices.new_zeros(boxes.shape[0])
    for b in range(boxes.shape[0]):
        if scores.dim() == 2:
            rows = torch.arange(scores.shape[1], device=scores.device)
            classes = torch.zeros_like(rows) if idxs is None else idxs[b]
            flat_scores = scores[b]
        else:
            classes, rows = torch.ones_like(scores[b], dtype=torch.bool).nonzero().unbind(1)
            flat_scores = scores[b].flatten()
        if score_threshold > float("-inf"):
            admitted = flat_scores > score_threshold
            classes, rows, flat_scores = classes[admitted], rows[admitted], flat_scores[admitted]
        kept = batched_nms(boxes[b][rows], flat_scores, classes, iou_threshold, diou)[:max_output]
        counts[b] = kept.numel()
        indices[b, : kept.numel()] = rows[kept]
        labels[b, : kept.numel()] = classes[kept]
    return indices, labels, counts
