"""Max pooling, values and positions in one pass.

A program has a tile of windows and goes over their taps in reading order, each one load, two comparisons and two
selections; taps that windows share come from the first-level cache. Windows of many taps are gone over by the lanes of
a program, a block of taps at a time, whose maxima are then compared.

Moved: each pixel once in, each value and index once out. 3x3 with stride 2 over 256x64x112x112 in bfloat16: 411 MB in,
103 MB of values and 51 MB of compact indices out, 0.13 ms on a card that copies 4.3 TB/s; the arithmetic is about 90
instructions for each of 51 M windows, 0.14 ms at 33.5 T a second, as much.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant, on_device_of
from ._pooling import (
    MOST_TAPS,
    coordinates,
    empty,
    is_channels_last,
    long_tiles,
    offset,
    outputs_of_program,
    pooled_sizes,
    pooling_variant,
    strides,
    tile,
    tiles,
    window_of,
)
from .max_unpool2d import VARIANTS as UNPOOL_VARIANTS
from .max_unpool2d import max_unpool2d, max_unpool2d_backward

__all__ = ["max_pool2d", "max_unpool2d", "max_unpool2d_backward"]

_MOST_COMPACT = 255


@triton.jit
def _max_pool2d_kernel(
    input, values, indices,
    channels, stride_n, stride_c, stride_y, stride_x, height, width, out_height, out_width, rows, column_blocks,
    WINDOW: tl.constexpr, INDEX_BYTES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    KERNEL_H: tl.constexpr = WINDOW[0]
    KERNEL_W: tl.constexpr = WINDOW[1]
    DILATION_H: tl.constexpr = WINDOW[6]
    DILATION_W: tl.constexpr = WINDOW[7]
    row, column = tile(tl.program_id(0), column_blocks, ROWS, COLUMNS, WIDE)
    image, channel, oy, ox = coordinates(row, column, channels, out_height, out_width, CHANNELS_LAST)
    columns = channels if CHANNELS_LAST else out_width
    if not CHANNELS_LAST:
        # Triton cannot tell that these are neighbours, and gives a lane one instead of several in a vector: windows are
        # a stride apart, and lanes side by side read from the same cache lines.
        ox = tl.minimum(ox, columns - 1)
    y0, x0 = oy * WINDOW[2] - WINDOW[4], ox * WINDOW[3] - WINDOW[5]
    has_row, has_column = row < rows, column < columns
    at = input + offset(image, channel, y0, x0, stride_n, stride_c, stride_y, stride_x)
    step_y, step_x = tl.cast(stride_y, tl.int64) * DILATION_H, tl.cast(stride_x, tl.int64) * DILATION_W
    best = tl.full((ROWS, COLUMNS), float("-inf"), tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32)
    # All of a window may be -infinity: its first pixel is the maximum then.
    first_y = (tl.maximum(-y0, 0) + DILATION_H - 1) // DILATION_H
    first_x = (tl.maximum(-x0, 0) + DILATION_W - 1) // DILATION_W
    index = tl.zeros((ROWS, COLUMNS), tl.int32) + first_y * KERNEL_W + first_x
    for i in tl.range(0, KERNEL_H, loop_unroll_factor=KERNEL_H if KERNEL_H * KERNEL_W <= 16 else 1):
        y = y0 + i * DILATION_H
        in_rows = has_row & (y >= 0) & (y < height)
        for j in tl.static_range(KERNEL_W):
            x = x0 + j * DILATION_W
            inside = in_rows & (has_column & (x >= 0) & (x < width))
            tap = tl.load(at + (i * step_y + j * step_x), mask=inside, other=float("-inf")).to(best.dtype)
            if INDEX_BYTES > 0:
                taken = (tap > best) | (tap != tap)  # NaN wins, the last one
                index = tl.where(taken, i * KERNEL_W + j, index)
                best = tl.where(taken, tap, best)
            else:
                best = tl.maximum(best, tap, propagate_nan=tl.PropagateNan.ALL)
    to = row.to(tl.int64) * columns + (column if CHANNELS_LAST else ox)
    tl.store(values + to, best.to(values.dtype.element_ty), mask=has_row & has_column)
    if INDEX_BYTES > 0:
        if INDEX_BYTES == 8:
            y, x = y0 + index // KERNEL_W * DILATION_H, x0 + index % KERNEL_W * DILATION_W
            index = y * width + x
        tl.store(indices + to, index.to(indices.dtype.element_ty), mask=has_row & has_column)


@triton.jit
def _max_pool2d_long_kernel(
    input, values, indices,
    channels, stride_n, stride_c, stride_y, stride_x, height, width, out_height, out_width, outputs,
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    INDEX_BYTES: tl.constexpr, ADAPTIVE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, OUTPUTS: tl.constexpr, TAPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    to, has_output, image, channel, oy, ox = outputs_of_program(
        outputs, channels, out_height, out_width, CHANNELS_LAST, OUTPUTS, WIDE
    )
    y0, end_y = window_of(oy, height, out_height, stride_h, padding_h, ADAPTIVE)
    x0, end_x = window_of(ox, width, out_width, stride_w, padding_w, ADAPTIVE)
    at = input + offset(image, channel, y0, x0, stride_n, stride_c, stride_y, stride_x)
    best = tl.full((OUTPUTS, TAPS), float("-inf"), tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32)
    none = tl.full((OUTPUTS, TAPS), 2**31 - 1, tl.int32)
    index = none
    taps = kernel_h * kernel_w
    for first in range(0, taps, TAPS):
        t = first + tl.arange(0, TAPS)[None, :]
        dy, dx = t // kernel_w * dilation_h, t % kernel_w * dilation_w
        y, x = y0 + dy, x0 + dx
        inside = has_output & (t < taps) & (y >= 0) & (y < end_y) & (x >= 0) & (x < end_x)
        step = dy.to(tl.int64) * stride_y + dx.to(tl.int64) * stride_x
        tap = tl.load(at + step, mask=inside, other=float("-inf")).to(best.dtype)
        taken = inside & ((tap > best) | (tap != tap) | (index == none))
        index = tl.where(taken, t, index)
        best = tl.where(taken, tap, best)
    nan = tl.max(tl.where(best != best, index, -1), axis=1, keep_dims=True)
    largest = tl.max(tl.where(best != best, float("-inf"), best), axis=1, keep_dims=True)
    index = tl.min(tl.where(best == largest, index, none), axis=1, keep_dims=True)
    index = tl.where(nan >= 0, nan, index)
    best = tl.where(nan >= 0, float("nan"), largest)
    tl.store(values + to, best.to(values.dtype.element_ty), mask=has_output)
    if INDEX_BYTES > 0:
        if INDEX_BYTES == 8:
            y, x = y0 + index // kernel_w * dilation_h, x0 + index % kernel_w * dilation_w
            index = y * width + x
        tl.store(indices + to, index.to(indices.dtype.element_ty), mask=has_output)


def max_pool2d(input: Tensor, *rest) -> tuple[Tensor, Tensor]:
    *window, ceil_mode, index_bytes = rest
    if index_bytes not in (0, 1, 8):
        raise RuntimeError(f"index_bytes: expected 0, 1 or 8, got {index_bytes}")
    images, channels, height, width = input.shape
    sizes = pooled_sizes(height, width, window, ceil_mode)
    _check_pixels(input, sizes, window)
    taps = window[0] * window[1]
    if index_bytes == 1 and taps > _MOST_COMPACT:
        raise RuntimeError(f"indices: compact ones serve windows of up to {_MOST_COMPACT} elements, got {taps}")
    channels_last = is_channels_last(input)
    shape = (images, channels, *sizes)
    values = empty(shape, input.dtype, input, channels_last)
    dtype = torch.int64 if index_bytes == 8 else torch.uint8
    indices = empty(shape if index_bytes else (0,), dtype, input, channels_last and index_bytes > 0)
    if values.numel() == 0:
        return values, indices
    if taps > MOST_TAPS:
        long_max_pool2d(input, values, indices, window, INDEX_BYTES=index_bytes, ADAPTIVE=False)
        return values, indices
    maps = (input, values, indices, *strides(channels_last, input), height, width, *sizes)
    grid, tiling = tiles(shape, values.element_size(), channels_last)
    with on_device_of(input):
        _max_pool2d_kernel[grid](*maps, WINDOW=tuple(window), INDEX_BYTES=index_bytes, **tiling)
    return values, indices


def long_max_pool2d(input: Tensor, values: Tensor, indices: Tensor, window: list[int], **constants) -> None:
    """By the kernel of long windows; adaptive pooling's ``window`` is the longest bin."""
    channels_last = is_channels_last(input)
    grid, tiling = long_tiles(values, channels_last, window[0] * window[1])
    maps = (input, values, indices, *strides(channels_last, input), *input.shape[2:], *values.shape[2:])
    with on_device_of(input):
        _max_pool2d_long_kernel[grid](*maps, tiling.pop("outputs"), *window, **constants, **tiling)


def _check_pixels(input: Tensor, sizes: tuple[int, int], window: list[int]) -> None:
    """Every window needs a pixel: one without has no maximum. Only dilated ones can step over a small map."""
    for d, windows in enumerate(sizes):
        size, stride, padding, dilation = input.shape[2 + d], *window[2 + d :: 2]
        for o in range(min(windows, -(-padding // stride)) if dilation > size else 0):
            if (o * stride - padding) % dilation >= size:
                raise RuntimeError(f"dilation: window {o} has no pixel of the input of {size} pixels")


# ---- what is compiled ahead of time ----------------------------------------------------------------


def variant(kernel, dtype: str, indices: str, note: str, **constants) -> Variant:
    types = {"input": f"*{dtype}", "values": f"*{dtype}", "indices": f"*{indices}"}
    return pooling_variant(kernel, types, note, INDEX_BYTES=8 if indices == "i64" else 1, **constants)


VARIANTS = [
    variant(
        _max_pool2d_kernel, "bf16", "u8", "3x3, stride 2, 256x64x112x112, channels-last; 566 MB, 0.13 ms",
        WINDOW=(3, 3, 2, 2, 1, 1, 1, 1), stride_c=1, column_blocks=1, CHANNELS_LAST=True, ROWS=16, COLUMNS=64,
    ),
    variant(
        _max_pool2d_kernel, "fp32", "u8", "2x2, 8x64x256x256; 176 MB, 0.04 ms",
        WINDOW=(2, 2, 2, 2, 0, 0, 1, 1), channels=1, stride_x=1, column_blocks=1,
        CHANNELS_LAST=False, ROWS=4, COLUMNS=128,
    ),
    variant(
        _max_pool2d_kernel, "fp16", "i64", "5x5, stride 1, 64x256x20x20, 24 of 32 lanes; 118 MB, 0.03 ms",
        WINDOW=(5, 5, 1, 1, 2, 2, 1, 1), channels=1, stride_x=1, CHANNELS_LAST=False, ROWS=64, COLUMNS=16,
    ),
    variant(
        _max_pool2d_long_kernel, "fp32", "i64", "13x13, stride 1, 16x256x13x13; 11 MB, 3 us, and 117 M taps",
        channels=1, stride_x=1, ADAPTIVE=False, CHANNELS_LAST=False, OUTPUTS=4, TAPS=256,
    ),
    *UNPOOL_VARIANTS,
]  # fmt: skip
