"""Position-sensitive RoIAlign in plain PyTorch: the specification of ``csrc/ps_roi_align``.

A region is two small matrices, as in RoIAlign, but every bin applies its pair of rows to channels of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .roi_align import _axis_weights, as_format_of, prepare

AxisWeights = Callable[[Tensor, Tensor, int, int], Tensor]
"""``(low, high, size, bins)`` of one axis of one region, before scaling -> weights ``[bins, size]``."""


def _bilinear(spatial_scale: float, sampling_ratio: int) -> AxisWeights:
    def weights(low, high, size, bins):
        low, high = low * spatial_scale - 0.5, high * spatial_scale - 0.5
        return _axis_weights(low, high, size, bins, sampling_ratio, widen=False)

    return weights


def pool(input: Tensor, boxes: Tensor, bins: tuple[int, int], axis_weights: AxisWeights) -> Tensor:
    images, channels, height, width = input.shape
    rois, dtype = prepare(boxes, input, images)
    outputs = [input.new_zeros(0, channels // (bins[0] * bins[1]), *bins, dtype=dtype)]
    with torch.autocast(boxes.device.type, enabled=False):
        for roi in rois:
            rows = axis_weights(roi[2], roi[4], height, bins[0]).to(dtype)
            columns = axis_weights(roi[1], roi[3], width, bins[1]).to(dtype)
            features = input[int(roi[0])].to(dtype).reshape(-1, *bins, height, width)
            pooled = torch.einsum("ph,cpqhw->cpqw", rows, features)
            outputs.append(torch.einsum("qw,cpqw->cpq", columns, pooled)[None])
    return as_format_of(torch.cat(outputs), input)


def pool_backward(grad: Tensor, boxes: Tensor, shape: tuple[int, ...], axis_weights: AxisWeights) -> Tensor:
    images, _, height, width = shape
    rois, dtype = prepare(boxes, grad, images)
    bins = grad.shape[2:]
    gradient = grad.new_zeros(images, grad.shape[1], *bins, height, width, dtype=dtype)
    with torch.autocast(boxes.device.type, enabled=False):
        for g, roi in zip(grad.to(dtype), rois, strict=True):
            rows = axis_weights(roi[2], roi[4], height, bins[0]).to(dtype)
            columns = axis_weights(roi[1], roi[3], width, bins[1]).to(dtype)
            gradient[int(roi[0])] += torch.einsum("ph,cpqw->cpqhw", rows, torch.einsum("qw,cpq->cpqw", columns, g))
    return as_format_of(gradient.reshape(shape), grad)


def ps_roi_align(
    input: Tensor, boxes: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, sampling_ratio: int
) -> Tensor:
    return pool(input, boxes, (pooled_height, pooled_width), _bilinear(spatial_scale, sampling_ratio))


def ps_roi_align_backward(
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
) -> Tensor:
    shape = batch_size, channels, height, width
    return pool_backward(grad, boxes, shape, _bilinear(spatial_scale, sampling_ratio))
