"""RoIAlign of rotated regions in plain PyTorch: the specification of ``csrc/roi_align_rotated``.

A region is a matrix from pixels to bins, the sums of its bilinear samples; the gradient is its transpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .roi_align import as_format_of, prepare


def _grid(bin_size: Tensor, sampling_ratio: int) -> int:
    return sampling_ratio if sampling_ratio > 0 else int(bin_size.ceil())


def _samples(box, scale, bins, sampling_ratio, aligned, clockwise) -> tuple[Tensor, Tensor] | None:
    """y and x ``[PH * PW, samples]``, in pixels."""
    centre, (width, height) = box[:2] * scale - (0.5 if aligned else 0.0), box[2:4] * scale
    if not aligned:
        width, height = width.clamp(min=1), height.clamp(min=1)
    turn = torch.deg2rad(box[4])
    cos, sin = turn.cos(), turn.sin() * (-1 if clockwise else 1)
    exists = (centre.abs() <= 1e9).all() and 0 < width <= 1e6 and 0 < height <= 1e6 and not cos.isnan()
    if not exists:
        return None
    along = []
    for extent, count in ((height, bins[0]), (width, bins[1])):
        grid = _grid(extent / count, sampling_ratio)
        p, i = (torch.arange(n, device=box.device, dtype=box.dtype) for n in (count, grid))
        along.append(-extent / 2 + p[:, None] * (extent / count) + (i + 0.5) * (extent / count) / grid)
    v, u = along[0][:, None, :, None], along[1][None, :, None, :]
    y, x = v * cos - u * sin + centre[1], v * sin + u * cos + centre[0]
    return y.flatten(2).flatten(0, 1), x.flatten(2).flatten(0, 1)


def _matrix(box, scale, bins, sampling_ratio, aligned, clockwise, height: int, width: int) -> Tensor:
    """``[PH * PW, H * W]``: the weight of each pixel in each bin."""
    weights = box.new_zeros(bins[0] * bins[1], height * width)
    samples = _samples(box, scale, bins, sampling_ratio, aligned, clockwise)
    if samples is None or weights.numel() == 0:
        return weights
    y, x = samples
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.floor().long(), x.floor().long()
    below, beside = y - top, x - left
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    share = inside.to(box.dtype) / y.shape[1]
    for row, column, weight in (
        (top, left, (1 - below) * (1 - beside)),
        (top, right, (1 - below) * beside),
        (bottom, left, below * (1 - beside)),
        (bottom, right, below * beside),
    ):
        weights.scatter_add_(1, row * width + column, weight * share)
    return weights


def roi_align_rotated(
    input: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> Tensor:
    rois, dtype = prepare(boxes, input, input.shape[0])
    bins, (height, width) = (pooled_height, pooled_width), input.shape[2:]
    outputs = [input.new_zeros(0, input.shape[1], *bins, dtype=dtype)]
    with torch.autocast(boxes.device.type, enabled=False):
        for roi in rois:
            weights = _matrix(roi[1:], spatial_scale, bins, sampling_ratio, aligned, clockwise, height, width)
            pooled = input[int(roi[0])].to(dtype).flatten(1) @ weights.to(dtype).T
            outputs.append(pooled.view(1, -1, *bins))
    return as_format_of(torch.cat(outputs), input)


def roi_align_rotated_backward(
    grad: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
    clockwise: bool,
) -> Tensor:
    """The forward's matrices transposed, region by region."""
    rois, dtype = prepare(boxes, grad, batch_size)
    bins = pooled_height, pooled_width
    gradient = grad.new_zeros(batch_size, channels, height * width, dtype=dtype)
    with torch.autocast(boxes.device.type, enabled=False):
        for g, roi in zip(grad, rois, strict=True):
            weights = _matrix(roi[1:], spatial_scale, bins, sampling_ratio, aligned, clockwise, height, width)
            gradient[int(roi[0])] += g.to(dtype).flatten(1) @ weights.to(dtype)
    return as_format_of(gradient.view(batch_size, channels, height, width), grad)
