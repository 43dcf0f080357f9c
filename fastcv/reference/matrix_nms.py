"""Matrix NMS in plain PyTorch: the specification of ``csrc/matrix_nms``."""

from __future__ import annotations

import torch
from torch import Tensor

from .nms import _accumulate, _overlap, _ranked


def _decay(boxes: Tensor, ids: Tensor, sigma: float, linear: bool) -> Tensor:
    """Factors [N] for boxes [N, 4] in order of their scores."""
    iou = torch.stack([_overlap(box, boxes, False) for box in boxes])  # [N, N]: better, worse
    counts = (ids[:, None] == ids).triu(1) & (iou > 0)
    iou = torch.where(counts, iou, 0.0)
    covered = iou.max(0).values[:, None]  # how far each box is itself overlapped by better ones
    if linear:
        ratio = (1 - iou) / (1 - covered)
        counts = counts & (covered < 1)
    else:
        ratio = torch.exp(-sigma * (iou**2 - covered**2))
    return torch.where(counts, ratio, 1.0).min(0).values.clamp(max=1)


def matrix_nms(boxes: Tensor, scores: Tensor, idxs: Tensor | None, sigma: float, linear: bool) -> Tensor:
    dtype = scores.dtype
    boxes, scores = _accumulate(boxes, scores)
    out = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    for b in range(boxes.shape[0]):
        rows = _ranked(boxes[b], scores[b])
        if rows.numel() == 0:
            continue
        ids = torch.zeros_like(rows) if idxs is None else idxs[b, rows]
        decay = _decay(boxes[b, rows], ids, sigma, linear)
        out[b, rows] = torch.where(decay > 0, scores[b, rows] * decay, 0.0)
    return out.to(dtype)
