"""Adaptive pooling in plain PyTorch: the specification of ``csrc/adaptive_pool2d``.

Bin ``o`` of ``bins`` has pixels ``floor(o * size / bins)`` to ``ceil((o + 1) * size / bins)``, exclusive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .roi_align import as_format_of


def _bins(size: int, bins: int) -> list[tuple[int, int]]:
    return [(o * size // bins, -(-(o + 1) * size // bins)) for o in range(bins)]


def _map_bins(input: Tensor, height: int, width: int, f) -> Tensor:
    """``f(window, y0, x0)`` of each bin, put together to ``[N, C, height, width]``."""
    rows = [
        torch.stack([f(input[:, :, y0:y1, x0:x1], y0, x0) for x0, x1 in _bins(input.shape[3], width)], -1)
        for y0, y1 in _bins(input.shape[2], height)
    ]
    return torch.stack(rows, -2)


def adaptive_avg_pool2d(input: Tensor, height: int, width: int) -> Tensor:
    if height * width == 0:
        return as_format_of(input.new_empty(*input.shape[:2], height, width), input)
    wide = input if input.dtype == torch.float64 else input.float()
    return as_format_of(_map_bins(wide, height, width, lambda window, y0, x0: window.mean((2, 3))), input)


def adaptive_avg_pool2d_backward(grad: Tensor, height: int, width: int) -> Tensor:
    wide = grad if grad.dtype == torch.float64 else grad.float()
    out = wide.new_zeros(*grad.shape[:2], height, width)
    for oy, (y0, y1) in enumerate(_bins(height, grad.shape[2])):
        for ox, (x0, x1) in enumerate(_bins(width, grad.shape[3])):
            out[:, :, y0:y1, x0:x1] += (wide[:, :, oy, ox] / ((y1 - y0) * (x1 - x0)))[:, :, None, None]
    return as_format_of(out, grad)


def adaptive_max_pool2d(input: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    memory_format = torch._prims_common.suggest_memory_format(input)
    if height * width == 0:
        values = input.new_empty(*input.shape[:2], height, width)
        return as_format_of(values, input), values.long()

    def position(window, y0, x0):
        flat, columns = window.flatten(2), window.shape[3]
        number = torch.arange(flat.shape[2], device=input.device)
        first = torch.where(flat == flat.amax(2, keepdim=True), number, flat.shape[2]).amin(2)
        last_nan = torch.where(flat.isnan(), number, -1).amax(2)
        index = torch.where(last_nan >= 0, last_nan, first)
        return (y0 + index // columns) * input.shape[3] + x0 + index % columns

    values = _map_bins(input, height, width, lambda window, y0, x0: window.amax((2, 3)))
    indices = _map_bins(input, height, width, position)
    return as_format_of(values, input), indices.contiguous(memory_format=memory_format)
