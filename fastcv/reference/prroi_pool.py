"""Precise RoI pooling in plain PyTorch: the specification of ``csrc/prroi_pool``.

The mean over a bin of the interpolated map is separable, so a region is two small matrices, ``out = Wy @ map @ Wx^T``.
``part`` asks for the mean (0) or its derivative by x1, y1, x2 or y2 (1 to 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .roi_align import as_format_of, prepare


def _hat(t: Tensor) -> Tensor:
    return (1 - t.abs()).clamp(min=0)


def _integral(a: Tensor, b: Tensor, left: float, right: float) -> Tensor:
    """Of the hat over the part of [a, b] within [left, right], where it is linear."""
    low, high = a.clamp(min=left), b.clamp(max=right)
    return (high - low).clamp(min=0) * _hat((low + high) / 2)


def _axis_weights(low: Tensor, high: Tensor, scale: float, size: int, bins: int, part: str) -> Tensor:
    """One axis of one region -> the weight of each of ``size`` pixels in each bin, ``[bins, size]``."""
    scale = low.new_tensor(scale)
    start = low * scale
    extent = high * scale - start
    bin_size = extent / bins
    if not (start.abs() <= 1e9 and bin_size > 0 and extent <= 1e9):
        return low.new_zeros(bins, size)
    p = torch.arange(bins, device=low.device, dtype=low.dtype)[:, None]
    pixels = torch.arange(size, device=low.device, dtype=low.dtype)
    a, b = start + p * bin_size - pixels, start + (p + 1) * bin_size - pixels
    width = b - a  # not bin_size: of a small one the ends are rounded
    mean = torch.where(width > 0, (_integral(a, b, -1, 0) + _integral(a, b, 0, 1)) / width, _hat(a))
    if part == "mean":
        return mean
    by_a, by_b = (mean - _hat(a)) / width, (_hat(b) - mean) / width
    to_a, to_b = p / bins, (p + 1) / bins
    by = by_a * to_a + by_b * to_b if part == "high" else by_a * (1 - to_a) + by_b * (1 - to_b)
    return torch.where(width > 0, scale * by, 0)


_PARTS = (("mean", "mean"), ("mean", "low"), ("low", "mean"), ("mean", "high"), ("high", "mean"))  # rows, columns


def _regions(height, width, boxes, spatial_scale, pooled_height, pooled_width, part, dtype):
    """For each region: its image, and its vertical and horizontal weights."""
    of_rows, of_columns = _PARTS[part]
    for roi in boxes:
        rows = _axis_weights(roi[2], roi[4], spatial_scale, height, pooled_height, of_rows)
        columns = _axis_weights(roi[1], roi[3], spatial_scale, width, pooled_width, of_columns)
        yield int(roi[0]), rows.to(dtype), columns.to(dtype)


def prroi_pool(
    input: Tensor, boxes: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, part: int
) -> Tensor:
    rois, dtype = prepare(boxes, input, input.shape[0])
    outputs = [input.new_zeros(0, input.shape[1], pooled_height, pooled_width, dtype=dtype)]
    with torch.autocast(boxes.device.type, enabled=False):
        for image, rows, columns in _regions(
            *input.shape[2:], rois, spatial_scale, pooled_height, pooled_width, part, dtype
        ):
            outputs.append((rows @ input[image].to(dtype) @ columns.T)[None])
    return as_format_of(torch.cat(outputs), input)


def prroi_pool_backward(
    grad: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    height: int,
    width: int,
    part: int,
) -> Tensor:
    """The forward's matrices transposed, region by region."""
    rois, dtype = prepare(boxes, grad, batch_size)
    gradient = grad.new_zeros(batch_size, channels, height, width, dtype=dtype)
    with torch.autocast(boxes.device.type, enabled=False):
        regions = _regions(height, width, rois, spatial_scale, pooled_height, pooled_width, part, dtype)
        for g, (image, rows, columns) in zip(grad, regions, strict=True):
            gradient[image] += rows.T @ g.to(dtype) @ columns
    return as_format_of(gradient, grad)
