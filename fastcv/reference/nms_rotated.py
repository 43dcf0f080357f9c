"""Greedy suppression of rotated boxes in plain PyTorch: the specification of ``csrc/box_iou_rotated``."""

from __future__ import annotations

import torch
from torch import Tensor

from .box_iou_rotated import box_iou_rotated


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    valid = ~(boxes.isnan().any(1) | boxes[:, 4].isinf() | scores.isnan())
    rows = valid.nonzero()[:, 0]
    rows = rows[torch.argsort(scores[rows], descending=True, stable=True)]
    kept = []
    while rows.numel():
        best, rows = rows[0], rows[1:]
        kept.append(best)
        rows = rows[~(box_iou_rotated(boxes[best, None], boxes[rows], torch.float64)[0] > iou_threshold)]
    return torch.stack(kept) if kept else rows


def nms_rotated(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    """float64 ``[N, 5]`` in cxcywhr (degrees), ``[N]``, int64 ``[N]`` or None give int64 ``[K]``, best first."""
    scores = scores.double()
    if idxs is None:
        return _nms(boxes, scores, iou_threshold)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for class_id in idxs.unique():
        rows = (idxs == class_id).nonzero()[:, 0]
        keep[rows[_nms(boxes[rows], scores[rows], iou_threshold)]] = True
    rows = keep.nonzero()[:, 0]
    return rows[torch.argsort(scores[rows], descending=True, stable=True)]
