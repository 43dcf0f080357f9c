"""RoIAlign in plain PyTorch: the specification of ``csrc/roi_align``.

The mean over a bin's grid of bilinear samples is separable, so a region is two small matrices,
``out = Wy @ map @ Wx^T``.
The gradient is written out, for the operators run below autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _axis_weights(low: Tensor, high: Tensor, size: int, bins: int, sampling_ratio: int, widen: bool) -> Tensor:
    """One axis of one region, in pixels -> the weight of each of ``size`` pixels in each bin, ``[bins, size]``."""
    extent = high - low
    if widen:
        extent = extent.clamp(min=1)
    weights = extent.new_zeros(bins, size)
    if not (low.abs() <= 1e30 and extent.abs() <= 1e30) or size == 0:
        return weights
    bin_size = extent / bins
    grid = sampling_ratio if sampling_ratio > 0 else int(bin_size.ceil().clamp(0, 1e9))
    if grid == 0:
        return weights
    first, last = 0, grid
    if bin_size > 0 and grid > 4 * (size + 2):  # a region far larger than the map: skip what is outside
        step = float(bin_size) / grid
        bounds = [low.item() + p * float(bin_size) for p in range(bins)]
    else:
        step, bounds = 0.0, None
    for p in range(bins):
        if bounds is not None:
            slack = 2 + 1e-5 * grid
            first = min(max(0, int((-1 - bounds[p]) / step - slack)), grid)
            last = max(first, min(grid, int((size - bounds[p]) / step + slack)))
        samples = torch.arange(first, last, device=low.device).to(low.dtype)
        at = (low + p * bin_size) + (samples + 0.5) * bin_size / grid
        at = at[(at >= -1) & (at <= size)].clamp(min=0)
        index = at.long().clamp(max=size - 1)
        fraction = torch.where(index >= size - 1, 0.0, at - index)
        weights[p].index_add_(0, index, (1 - fraction) / grid)
        weights[p].index_add_(0, (index + 1).clamp(max=size - 1), fraction / grid)
    return weights


def prepare(boxes: Tensor, features: Tensor, images: int) -> tuple[Tensor, torch.dtype]:
    """Boxes in the type of coordinates, double where they or the features are and else float32; and the type of sums,
    double where the features are. Raises for the first region whose batch index is not that of an image.
    """
    double = torch.float64 in (boxes.dtype, features.dtype)
    boxes = boxes.to(torch.float64 if double else torch.float32)
    bad = ~((boxes[:, 0] >= 0) & (boxes[:, 0] < images))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise RuntimeError(
            f"boxes: row {row} has batch index {float(boxes[row, 0])}, expected 0 to {images - 1} "
            f"(the input holds {images} images)"
        )
    return boxes, torch.float64 if features.dtype == torch.float64 else torch.float32


def _regions(sizes, boxes, levels, spatial_scales, pooled_height, pooled_width, sampling_ratio, aligned, dtype):
    """For each region: level, image, and its vertical and horizontal weights; ``sizes`` are those of the maps."""
    offset = 0.5 if aligned else 0.0
    for roi, level in zip(boxes, levels, strict=True):
        x1, y1, x2, y2 = roi[1:] * spatial_scales[level] - offset
        height, width = sizes[level]
        rows = _axis_weights(y1, y2, height, pooled_height, sampling_ratio, not aligned)
        columns = _axis_weights(x1, x2, width, pooled_width, sampling_ratio, not aligned)
        yield level, int(roi[0]), rows.to(dtype), columns.to(dtype)


def as_format_of(result: Tensor, like: Tensor) -> Tensor:
    """``result`` in the dtype and memory format of another tensor."""
    memory_format = torch._prims_common.suggest_memory_format(like)
    return result.to(like.dtype).contiguous(memory_format=memory_format)


def roi_align(
    input: Tensor,
    boxes: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    scales = [spatial_scale]
    return multiscale_roi_align([input], boxes, scales, pooled_height, pooled_width, sampling_ratio, aligned, 224, 4)


def roi_levels(boxes: Tensor, spatial_scales: list[float], canonical_scale: int, canonical_level: int) -> Tensor:
    """The pyramid level of each region (Lin et al., FPN, CVPR 2017, equation 1): the finest that is coarse enough."""
    size = ((boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2])).sqrt()
    wanted = torch.floor(canonical_level + torch.log2(size / canonical_scale) + 1e-6)
    available = [round(-math.log2(scale)) for scale in spatial_scales[:-1]]
    return sum(((wanted > level).long() for level in available), torch.zeros_like(wanted, dtype=torch.int64))


def _levels(rois: Tensor, spatial_scales: list[float], canonical_scale: int, canonical_level: int) -> list[int]:
    if len(spatial_scales) == 1:
        return [0] * rois.shape[0]
    return roi_levels(rois, spatial_scales, canonical_scale, canonical_level).tolist()


def multiscale_roi_align(
    inputs: list[Tensor],
    boxes: Tensor,
    spatial_scales: list[float],
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: int,
    canonical_level: int,
) -> Tensor:
    rois, dtype = prepare(boxes, inputs[0], inputs[0].shape[0])
    levels = _levels(rois, spatial_scales, canonical_scale, canonical_level)
    sizes = [m.shape[2:] for m in inputs]
    outputs = [inputs[0].new_zeros(0, inputs[0].shape[1], pooled_height, pooled_width, dtype=dtype)]
    with torch.autocast(boxes.device.type, enabled=False):
        for level, image, rows, columns in _regions(
            sizes, rois, levels, spatial_scales, pooled_height, pooled_width, sampling_ratio, aligned, dtype
        ):
            outputs.append((rows @ inputs[level][image].to(dtype) @ columns.T)[None])
    return as_format_of(torch.cat(outputs), inputs[0])


def roi_align_backward(
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
) -> Tensor:
    return multiscale_roi_align_backward(
        grad, boxes, [spatial_scale], pooled_height, pooled_width, batch_size, channels,
        [height], [width], sampling_ratio, aligned, 224, 4,
    )[0]  # fmt: skip


def multiscale_roi_align_backward(
    grad: Tensor,
    boxes: Tensor,
    spatial_scales: list[float],
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    heights: list[int],
    widths: list[int],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: int,
    canonical_level: int,
) -> list[Tensor]:
    """The forward's matrices transposed, region by region."""
    rois, dtype = prepare(boxes, grad, batch_size)
    levels = _levels(rois, spatial_scales, canonical_scale, canonical_level)
    sizes = list(zip(heights, widths, strict=True))
    gradients = [grad.new_zeros(batch_size, channels, h, w, dtype=dtype) for h, w in sizes]
    with torch.autocast(boxes.device.type, enabled=False):
        regions = _regions(
            sizes, rois, levels, spatial_scales, pooled_height, pooled_width, sampling_ratio, aligned, dtype
        )
        for g, (level, image, rows, columns) in zip(grad, regions, strict=True):
            gradients[level][image] += rows.T @ g.to(dtype) @ columns
    return [as_format_of(g, grad) for g in gradients]
