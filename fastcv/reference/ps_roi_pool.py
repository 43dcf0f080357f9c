"""Position-sensitive RoI pooling in plain PyTorch: the specification of ``ps_roi_pool`` in ``csrc/ps_roi_align``."""

from __future__ import annotations

import torch
from torch import Tensor

from .ps_roi_align import AxisWeights, pool, pool_backward
from .roi_pool import _round


def _mean(spatial_scale: float) -> AxisWeights:
    def weights(low, high, size, bins):
        first, last = _round(low * spatial_scale), _round(high * spatial_scale)
        result = low.new_zeros(bins, size)
        if not (first.abs() <= 1e9 and last.abs() <= 1e9) or size == 0:
            return result
        bin_size = (last - first).clamp(min=1) / bins
        p = torch.arange(bins, device=low.device).to(low.dtype)
        begin = (torch.floor(p * bin_size) + first).clamp(0, size - 1).long().tolist()
        end = (torch.ceil((p + 1) * bin_size) + first).clamp(0, size - 1).long().tolist()
        for row, b, e in zip(result, begin, end, strict=True):
            row[b:e] = 1 / max(e - b, 1)
        return result

    return weights


def ps_roi_pool(input: Tensor, boxes: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int) -> Tensor:
    return pool(input, boxes, (pooled_height, pooled_width), _mean(spatial_scale))


def ps_roi_pool_backward(
    grad: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    height: int,
    width: int,
) -> Tensor:
    return pool_backward(grad, boxes, (batch_size, channels, height, width), _mean(spatial_scale))
