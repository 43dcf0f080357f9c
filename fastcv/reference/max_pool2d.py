"""Max pooling and unpooling in plain PyTorch: the specification of ``csrc/max_pool2d``.

``window`` is kernel, stride, padding and dilation, each for rows and columns. An index is flat, ``y * W + x`` in
int64, or compact, the element ``i * KW + j`` of its window in uint8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .roi_align import as_format_of


def _pixels(windows: int, d: int, window: list[int], device) -> Tensor:
    """Where the taps of each window lie along axis ``d``: ``[windows, kernel]``, also outside."""
    kernel, stride, padding, dilation = window[d::2]
    o, k = torch.arange(windows, device=device), torch.arange(kernel, device=device)
    return (o * stride - padding)[:, None] + k * dilation


def _inside(pixels: Tensor, size: int) -> Tensor:
    return (pixels >= 0) & (pixels < size)


def windows_of(input: Tensor, window: list[int], height: int, width: int, outside: float) -> tuple[Tensor, Tensor]:
    """The elements of each of ``height x width`` windows, ``[N, C, height, width, KH * KW]``, and which are pixels."""
    rows = _pixels(height, 0, window, input.device)
    columns = _pixels(width, 1, window, input.device)
    inside = _inside(rows, input.shape[2])[:, None, :, None] & _inside(columns, input.shape[3])[None, :, None, :]
    rows, columns = rows.clamp(0, input.shape[2] - 1), columns.clamp(0, input.shape[3] - 1)
    taps = input[:, :, rows[:, None, :, None], columns[None, :, None, :]]
    return torch.where(inside, taps, outside).flatten(4), inside.flatten(2)


def max_pool2d(input: Tensor, *rest) -> tuple[Tensor, Tensor]:
    """``rest``: the window's numbers, ceil_mode, index_bytes: 0 for no indices, 1 for compact, 8 for flat ones."""
    from ..ops._pooling import pooled_size

    *window, ceil_mode, index_bytes = rest

    height, width = (pooled_size(input.shape[2 + d], d, window, ceil_mode) for d in (0, 1))
    taps, inside = windows_of(input, window, height, width, float("-inf"))
    if not inside.any(-1).all():
        raise RuntimeError("dilation: expected a pixel of the input in every window")
    if index_bytes == 1 and taps.shape[-1] > 255:
        raise RuntimeError("indices: compact ones serve windows of up to 255 elements")
    values = taps.amax(-1)
    number = torch.arange(taps.shape[-1], device=input.device)
    first = torch.where((taps == values[..., None]) & inside, number, taps.shape[-1]).amin(-1)
    last_nan = torch.where(taps.isnan(), number, -1).amax(-1)
    index = torch.where(last_nan >= 0, last_nan, first)
    memory_format = torch._prims_common.suggest_memory_format(input)
    if index_bytes == 0:
        indices = torch.empty(0, dtype=torch.uint8, device=input.device)
    elif index_bytes == 1:
        indices = index.to(torch.uint8).contiguous(memory_format=memory_format)
    else:
        indices = flat(index, window, input.shape[3]).contiguous(memory_format=memory_format)
    return as_format_of(values, input), indices


def flat(indices: Tensor, window: list[int], width: int) -> Tensor:
    """Flat indices, int64, of compact ones for a map of ``width`` columns."""
    index = indices.long()
    oy = torch.arange(index.shape[-2], device=index.device)[:, None]
    ox = torch.arange(index.shape[-1], device=index.device)
    y = oy * window[2] - window[4] + index // window[1] * window[6]
    x = ox * window[3] - window[5] + index % window[1] * window[7]
    return y * width + x


def _checked(indices: Tensor, window: list[int], height: int, width: int) -> Tensor:
    """Flat indices ``[N, C, P]``, all of them pixels of the map."""
    if indices.dtype == torch.uint8:
        index = flat(indices, window, width)
        rows = _pixels(indices.shape[2], 0, window, indices.device)
        columns = _pixels(indices.shape[3], 1, window, indices.device)
        inside = _inside(rows, height)[:, None, :, None] & _inside(columns, width)[None, :, None, :]
        inside = inside.flatten(2).expand(*indices.shape, -1)
        tap = indices.long()
        good = (tap < inside.shape[-1]) & inside.gather(-1, tap.clamp(max=inside.shape[-1] - 1)[..., None])[..., 0]
    else:
        index, good = indices, (indices >= 0) & (indices < height * width)
    if not good.all():
        raise RuntimeError(f"indices: expected pixels, 0 to {height * width - 1}")
    return index.flatten(2)


def _owners(index: Tensor, pixels: int) -> Tensor:
    """Of each pixel the last window that points at it, -1 where none does: ``[N, C, pixels]``."""
    number = torch.arange(index.shape[2], device=index.device).expand(index.shape)
    owners = torch.full((*index.shape[:2], pixels), -1, dtype=torch.int64, device=index.device)
    return owners.scatter_reduce(2, index, number, "amax")


def unpool_flat(input: Tensor, index: Tensor, pixels: int) -> Tensor:
    """``[N, C, pixels]``: the last window's value at each pixel, 0 where no index points."""
    owners = _owners(index, pixels)
    values = input.flatten(2).gather(2, owners.clamp(min=0)) if index.shape[2] else input.new_zeros(owners.shape)
    return torch.where(owners >= 0, values, 0)


def max_unpool2d(input: Tensor, indices: Tensor, height: int, width: int, *rest) -> Tensor:
    """``rest``: the window's numbers; whether values that meet are added, or the last one stays."""
    *window, sum = rest
    index = _checked(indices, window, height, width)
    if sum:
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        out = torch.zeros(*input.shape[:2], height * width, dtype=dtype, device=input.device)
        out = out.scatter_add(2, index, input.flatten(2).to(dtype))
    else:
        out = unpool_flat(input, index, height * width)
    return as_format_of(out.unflatten(2, (height, width)), input)


def max_unpool2d_backward(grad: Tensor, indices: Tensor, *rest) -> Tensor:
    *window, sum = rest
    index = _checked(indices, window, grad.shape[2], grad.shape[3])
    values = grad.flatten(2).gather(2, index)
    if not sum:
        owners = _owners(index, grad.shape[2] * grad.shape[3])
        number = torch.arange(index.shape[2], device=index.device)
        values = torch.where(owners.gather(2, index) == number, values, 0)
    return as_format_of(values.view(indices.shape), grad)
