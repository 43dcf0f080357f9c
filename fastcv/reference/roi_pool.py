"""RoI pooling in plain PyTorch: the specification of ``csrc/roi_pool``."""

from __future__ import annotations

import torch
from torch import Tensor

from .roi_align import as_format_of, prepare


def _round(x: Tensor) -> Tensor:
    """Half away from zero, as C rounds."""
    return torch.where(x < 0, -torch.floor(-x + 0.5), torch.floor(x + 0.5))


def _ranges(low: Tensor, high: Tensor, scale: float, bins: int, size: int) -> list[tuple[int, int]]:
    first, last = _round(low * scale), _round(high * scale)
    if not (first.abs() <= 1e9 and last.abs() <= 1e9):
        return [(0, 0)] * bins
    bin_size = (last - first + 1).clamp(min=1) / bins
    p = torch.arange(bins, device=low.device).to(low.dtype)
    begin = (torch.floor(p * bin_size) + first).clamp(0, size).long().tolist()
    end = (torch.ceil((p + 1) * bin_size) + first).clamp(0, size).long().tolist()
    return list(zip(begin, end, strict=True))


def roi_pool(
    input: Tensor, boxes: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[Tensor, Tensor]:
    images, channels, height, width = input.shape
    rois, _ = prepare(boxes, input, images)
    output = input.new_zeros(rois.shape[0], channels, pooled_height, pooled_width)
    argmax = torch.full(output.shape, -1, dtype=torch.int32, device=input.device)
    for k, roi in enumerate(rois):
        rows = _ranges(roi[2], roi[4], spatial_scale, pooled_height, height)
        columns = _ranges(roi[1], roi[3], spatial_scale, pooled_width, width)
        for ph, (y0, y1) in enumerate(rows):
            for pw, (x0, x1) in enumerate(columns):
                if y0 >= y1 or x0 >= x1:
                    continue
                window = input[int(roi[0]), :, y0:y1, x0:x1].flatten(1)
                value, index = torch.where(window.isnan(), float("-inf"), window).max(1)
                # The first of equal values: max() promises no order.
                index = (window == value[:, None]).int().argmax(1)
                output[k, :, ph, pw] = value
                argmax[k, :, ph, pw] = ((y0 + index // (x1 - x0)) * width + x0 + index % (x1 - x0)).int()
    memory_format = torch._prims_common.suggest_memory_format(input)
    return as_format_of(output, input), argmax.contiguous(memory_format=memory_format)


def roi_pool_backward(
    grad: Tensor,
    boxes: Tensor,
    argmax: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    height: int,
    width: int,
) -> Tensor:
    rois, dtype = prepare(boxes, grad, batch_size)
    _check_argmax(argmax, rois, spatial_scale, pooled_height, height, width)
    gradient = torch.zeros(batch_size, channels, height * width, dtype=dtype, device=grad.device)
    image, channel, position = gather_index(rois, argmax)
    values = torch.where(argmax >= 0, grad, 0).to(dtype).flatten(2)
    gradient.index_put_((image, channel, position), values, accumulate=True)
    return as_format_of(gradient.unflatten(2, (height, width)), grad)


def _check_argmax(argmax: Tensor, rois: Tensor, spatial_scale: float, bins: int, height: int, width: int) -> None:
    rows = [_ranges(roi[2], roi[4], spatial_scale, bins, height) for roi in rois]
    bounds = torch.tensor(rows, dtype=torch.int64, device=argmax.device).view(-1, 1, bins, 1, 2) * width
    inside = (argmax >= bounds[..., 0]) & (argmax < bounds[..., 1])
    if not (inside | (argmax == -1) | (bounds[..., 0] >= bounds[..., 1])).all():
        raise RuntimeError("argmax: expected -1 or positions in the rows of their bins")


def gather_index(boxes: Tensor, argmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index of each bin's maximum in a map ``[N, C, H * W]``; bins without one point to pixel 0."""
    position = argmax.flatten(2).clamp(min=0).long()
    channel = torch.arange(argmax.shape[1], device=argmax.device)
    return boxes[:, 0].long()[:, None, None], channel[None, :, None], position
