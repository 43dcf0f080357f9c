"""Average pooling in plain PyTorch: the specification of ``csrc/avg_pool2d``. ``window`` is kernel, stride
and padding, each for rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from .max_pool2d import windows_of
from .roi_align import as_format_of


def _sizes(input: int, windows: int, d: int, window: list[int], include_pad: bool, device) -> Tensor:
    """How many elements count along axis ``d``: what stands out of the padding does not."""
    kernel, stride, padding, _ = window[d::2]
    first = torch.arange(windows, device=device) * stride - padding
    last = (first + kernel).clamp(max=input + padding)
    return last - first if include_pad else last.clamp(max=input) - first.clamp(min=0)


def _divisors(height, width, rows, columns, window, include_pad, divisor, like: Tensor) -> Tensor:
    if divisor:
        return like.new_full((rows, columns), divisor)
    y = _sizes(height, rows, 0, window, include_pad, like.device)
    x = _sizes(width, columns, 1, window, include_pad, like.device)
    return (y[:, None] * x).to(like.dtype)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def avg_pool2d(input: Tensor, *rest) -> Tensor:
    """``rest``: the window's numbers, ceil_mode, count_include_pad, divisor (0: the size of the window)."""
    from ..ops._pooling import pooled_size

    *window, ceil_mode, count_include_pad, divisor = rest
    window += [1, 1]

    rows, columns = (pooled_size(input.shape[2 + d], d, window, ceil_mode) for d in (0, 1))
    sums = windows_of(_wide(input), window, rows, columns, 0.0)[0].sum(-1)
    return as_format_of(
        sums / _divisors(*input.shape[2:], rows, columns, window, count_include_pad, divisor, sums), input
    )


def avg_pool2d_backward(grad: Tensor, height: int, width: int, *rest) -> Tensor:
    *window, count_include_pad, divisor = rest
    window += [1, 1]
    rows, columns = grad.shape[2:]
    share = _wide(grad)
    share = share / _divisors(height, width, rows, columns, window, count_include_pad, divisor, share)
    pixel = torch.arange(height * width, device=grad.device).view(1, 1, height, width)
    taps, inside = windows_of(pixel, window, rows, columns, 0)
    index = taps.reshape(-1)[inside.reshape(-1)]
    spread = share.flatten(2)[..., None].expand(*share.shape[:2], -1, inside.shape[-1]).flatten(2)
    out = share.new_zeros(*grad.shape[:2], height * width)
    out = out.index_add(2, index, spread[..., inside.reshape(-1)])
    return as_format_of(out.unflatten(2, (height, width)), grad)
