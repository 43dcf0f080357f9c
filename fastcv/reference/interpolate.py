"""Resampling in plain PyTorch: the specification of ``csrc/interpolate``.

Coordinates are computed in float32, in float64 for bilinear resampling of float64, as torch does.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _axis(mode: str, size: int, out: int, scale: float, align_corners: bool, like: Tensor) -> Tensor:
    """The matrix ``[out, size]`` of one axis, in the type of sums."""
    sums = torch.float64 if like.dtype == torch.float64 else torch.float32
    o = torch.arange(out, device=like.device)
    matrix = torch.zeros(out, size, dtype=sums, device=like.device)
    if mode == "bed_of_nails":
        if out % size:
            raise RuntimeError(f"output_size: expected multiples of the input's size, got {out} for {size}")
        matrix[o[:: out // size], o[:size]] = 1
    elif mode == "nearest":
        step = torch.tensor(1 / scale if scale > 0 else size / out, dtype=torch.float32, device=like.device)
        matrix[o, (o.float() * step).floor().long().clamp(max=size - 1)] = 1
    elif mode == "bilinear" and size == out:
        matrix[o, o] = 1
    elif mode == "bilinear":
        if align_corners:
            at = o.to(sums) * torch.tensor((size - 1) / (out - 1) if out > 1 else 0.0, dtype=sums, device=like.device)
        else:
            step = torch.tensor(1 / scale if scale > 0 else size / out, dtype=sums, device=like.device)
            at = ((o.to(sums) + 0.5) * step - 0.5).clamp(min=0)
        low = at.long().clamp(max=size - 1)
        weight = (at - low).clamp(0, 1)
        matrix[o, low] += 1 - weight
        matrix[o, (low + 1).clamp(max=size - 1)] += weight
    else:
        raise RuntimeError(f'mode: expected "nearest", "bilinear" or "bed_of_nails", got "{mode}"')
    return matrix


def _apply(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    result = (rows @ x.to(rows.dtype) @ columns.mT).to(x.dtype)
    return result.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))


def interpolate(
    input: Tensor, output_size: list[int], scale_h: float, scale_w: float, mode: str, align_corners: bool
) -> Tensor:
    """``Y = R X C^T``, with a row of R and C for each output row and column."""
    rows = _axis(mode, input.shape[2], output_size[0], scale_h, align_corners, input)
    columns = _axis(mode, input.shape[3], output_size[1], scale_w, align_corners, input)
    return _apply(input, rows, columns)


def interpolate_backward(
    grad: Tensor, input_size: list[int], scale_h: float, scale_w: float, mode: str, align_corners: bool
) -> Tensor:
    rows = _axis(mode, input_size[0], grad.shape[2], scale_h, align_corners, grad)
    columns = _axis(mode, input_size[1], grad.shape[3], scale_w, align_corners, grad)
    return _apply(grad, rows.mT, columns.mT)
