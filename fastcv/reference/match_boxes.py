"""Boxes matched to ground truth in plain PyTorch: the specification of ``csrc/match_boxes``."""

from __future__ import annotations

import torch
from torch import Tensor


def match_boxes(
    gt_boxes: Tensor, boxes: Tensor, high_threshold: float, low_threshold: float, allow_low_quality_matches: bool
) -> Tensor:
    if not gt_boxes.shape[0] or not boxes.shape[0]:
        return torch.full((boxes.shape[0],), -1, device=boxes.device)
    truth, other = gt_boxes[:, None], boxes[None]
    size = torch.minimum(truth[..., 2:], other[..., 2:]) - torch.maximum(truth[..., :2], other[..., :2])
    overlap = torch.where((size > 0).all(-1), size.prod(-1), 0)
    areas = [(b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) for b in (truth, other)]
    iou = torch.where(overlap > 0, overlap / (areas[0] + areas[1] - overlap), 0)
    best = iou.amax(0)
    rows = torch.arange(gt_boxes.shape[0], device=boxes.device)[:, None]
    first = torch.where(iou == best, rows, gt_boxes.shape[0]).amin(0)
    matched = best >= high_threshold
    if allow_low_quality_matches:
        matched |= (iou == iou.amax(1, keepdim=True)).any(0)
    return torch.where(matched, first, torch.where(best < low_threshold, -1, -2))
