"""Adaptive pooling, by the kernels of average and max pooling: bins are windows whose starts and ends are computed.

The lanes of a program share the pixels of one bin or of several, or of one bin in several channels. The gradient of
means is gathered, as that of windows; the one of maxima goes through max unpooling.

Moved: each pixel once in, each bin once out, and the reverse. The mean of each map of 64x2048x7x7 in float16 (the head
of a ResNet-50): 13 MB in, 3 us on a card that copies 4.3 TB/s; 7x7 bins of 64x512x14x14, the gradient, 29 MB, 7 us.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import avg_pool2d as avg
from . import max_pool2d as max
from ._pooling import MOST_PIXELS, empty, is_channels_last, longest_bin

_MOST = 2**31 - 1


def adaptive_avg_pool2d(input: Tensor, height: int, width: int) -> Tensor:
    _check(input.shape[2:], (height, width))
    out = empty((*input.shape[:2], height, width), input.dtype, input, is_channels_last(input))
    if out.numel():
        window = [*_longest(input.shape[2:], (height, width)), 1, 1, 0, 0]
        avg.long_avg_pool2d(input, out, window, INCLUDE_PAD=True, DIVISOR=0, ADAPTIVE=True)
    return out


def adaptive_avg_pool2d_backward(grad: Tensor, height: int, width: int) -> Tensor:
    _check((height, width), grad.shape[2:])
    return avg.gathered(grad, (height, width), [1, 1, 1, 1, 0, 0], INCLUDE_PAD=True, DIVISOR=0, ADAPTIVE=True)


def adaptive_max_pool2d(input: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    _check(input.shape[2:], (height, width))
    channels_last = is_channels_last(input)
    shape = (*input.shape[:2], height, width)
    values, indices = (empty(shape, dtype, input, channels_last) for dtype in (input.dtype, torch.int64))
    if values.numel():
        window = [*_longest(input.shape[2:], (height, width)), 1, 1, 0, 0, 1, 1]
        max.long_max_pool2d(input, values, indices, window, INDEX_BYTES=8, ADAPTIVE=True)
    return values, indices


def _check(sizes: Sequence[int], bins: Sequence[int]) -> None:
    """What kernels count on, as they count in 32 bits."""
    if min(sizes) < 1 or sizes[0] * sizes[1] > MOST_PIXELS:
        raise RuntimeError(f"input: expected 1 to 2^31 - 2^10 pixels per channel, got {sizes[0]} x {sizes[1]}")
    for size, count in zip(sizes, bins, strict=True):
        if count < 0 or size * count > _MOST:
            raise RuntimeError(
                f"output_size: expected fewer than 2^31 / {size} bins on an axis of {size} pixels, got {count}"
            )


def _longest(sizes: Sequence[int], bins: Sequence[int]) -> list[int]:
    return [longest_bin(size, count) for size, count in zip(sizes, bins, strict=True)]


# ---- what is compiled ahead of time ----------------------------------------------------------------


_CONTIGUOUS = {"channels": 1, "CHANNELS_LAST": False, "OUTPUTS": 16, "TAPS": 64}
_CHANNELS_LAST = {"CHANNELS_LAST": True, "OUTPUTS": 32, "TAPS": 32}

VARIANTS = [
    avg.variant(
        avg._avg_pool2d_long_kernel, "fp16", "means of maps, 64x2048x7x7; 13 MB, 3 us",
        stride_x=1, out_height=1, out_width=1, ADAPTIVE=True, **_CONTIGUOUS,
    ),
    avg.variant(
        avg._avg_pool2d_long_kernel, "bf16", "means of maps, 64x2048x7x7, channels-last; 13 MB, 3 us",
        stride_c=1, out_height=1, out_width=1, ADAPTIVE=True, **_CHANNELS_LAST,
    ),
    avg.variant(
        avg._avg_pool2d_backward_kernel, "fp32", "gradient of 7x7 bins, 64x512x14x14; 32 MB, 7 us",
        grad_x=1, WINDOW=(1, 1, 1, 1, 0, 0), COVER_H=1, COVER_W=1, UNROLL=1, ADAPTIVE=True,
        channels=1, column_blocks=1, CHANNELS_LAST=False, ROWS=32, COLUMNS=16,
    ),
    max.variant(
        max._max_pool2d_long_kernel, "fp16", "i64", "6x6 bins, 16x512x13x13, contiguous; 4 MB, 1 us",
        stride_x=1, ADAPTIVE=True, **_CONTIGUOUS,
    ),
    max.variant(
        max._max_pool2d_long_kernel, "bf16", "i64", "6x6 bins, 16x512x13x13, channels-last; 4 MB, 1 us",
        stride_c=1, ADAPTIVE=True, **_CHANNELS_LAST,
    ),
]  # fmt: skip
