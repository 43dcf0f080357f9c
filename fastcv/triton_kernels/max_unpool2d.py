"""Max unpooling and the gradients of both, from windows to the pixels that their indices name and back.

Towards the map each pixel asks the windows that cover it, in reading order, whether they point at it, and is written
once: no zeros before, nothing atomic but counts, and the values of windows that meet are added, or the last one kept,
in one order. A window is asked by comparing its index with the tap that would be this pixel (compact) or with the pixel
(flat). A compact index cannot point outside its window; one that is no tap of it is nobody's. A flat index may: what
was found is counted, and where that is not every window, the map is written again (_unpool_anywhere.py).

Moved: each value and index once in, as they lie in the first-level cache when the next pixel asks; each pixel once out.
2x2 to 8x64x256x256 in float32: 34 MB in, 8 or 67 MB of indices, 134 MB out, 0.04 or 0.05 ms on a card that copies
4.3 TB/s; about 60 instructions for each of 34 M pixels, 0.07 ms at 30 T a second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import on_device_of
from ._pooling import (
    check_window,
    coordinates,
    covering,
    empty,
    is_channels_last,
    most_covering,
    offset,
    strides,
    tile,
    tiles,
)
from ._unpool_anywhere import (
    CHANNELS_LAST,
    CONTIGUOUS,
    nan_of,
    owners_of,
    pixel_of,
    unpool_anywhere,
    unpool_variant,
)
from ._unpool_anywhere import VARIANTS as ANYWHERE_VARIANTS

_MOST = 2**31 - 1
_MOST_UNROLLED = 25  # compact taps, or windows that cover a pixel
_MOST_UNROLLED_FLAT = 9  # indices of eight bytes take more registers
_OF_BINS = [1, 1, 1, 1, 0, 0, 1, 1]  # which windows adaptive pooling says it has


@triton.jit
def _from_windows(
    values, positions, value_y, value_x, position_y, position_x, has_row, has_column, cell_y, cell_x,
    windows_y, windows_x, pixel, is_pixel, found,
    PHASE_Y: tl.constexpr, PHASE_X: tl.constexpr, WINDOW: tl.constexpr, SUM: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """What a pixel of each cell gets from the windows that start in its cell and in those before: at known taps."""
    value = tl.zeros(found.shape, tl.float64 if values.dtype.element_ty == tl.float64 else tl.float32)
    BACK_H: tl.constexpr = (WINDOW[0] - 1) * WINDOW[6] // WINDOW[2]
    BACK_W: tl.constexpr = (WINDOW[1] - 1) * WINDOW[7] // WINDOW[3]
    for a in tl.static_range(BACK_H, -1, -1):
        for b in tl.static_range(BACK_W, -1, -1):
            i, j = PHASE_Y + a * WINDOW[2], PHASE_X + b * WINDOW[3]
            if i % WINDOW[6] == 0 and i < WINDOW[0] * WINDOW[6] and j % WINDOW[7] == 0 and j < WINDOW[1] * WINDOW[7]:
                asked_y = has_row & (cell_y >= a) & (cell_y < windows_y + a)
                asked = asked_y & (has_column & (cell_x >= b) & (cell_x < windows_x + b))
                index = tl.load(positions - (position_y * a + position_x * b), mask=asked)
                given = tl.load(values - (value_y * a + value_x * b), mask=asked).to(value.dtype)
                if COMPACT:
                    here = asked & (index == i // WINDOW[6] * WINDOW[1] + j // WINDOW[7])
                else:
                    here = asked & is_pixel & (index == pixel)
                    found += here
                value = tl.where(here, value + given if SUM else given, value)
    return value, found


@triton.jit
def _max_unpool2d_kernel(
    input, indices, out, found, channels,
    input_n, input_c, input_y, input_x, index_n, index_c, index_y, index_x, out_n, out_c, out_y, out_x,
    windows_y, windows_x, height, width, rows, column_blocks, cells_y, cells_x,
    WINDOW: tl.constexpr, SUM: tl.constexpr, COMPACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of cells of stride x stride pixels, each with the window that starts there; for strides of 1 and 2."""
    STRIDE_H: tl.constexpr = WINDOW[2]
    STRIDE_W: tl.constexpr = WINDOW[3]
    row, column = tile(tl.program_id(0), column_blocks, ROWS, COLUMNS, WIDE)
    image, channel, cell_y, cell_x = coordinates(row, column, channels, cells_y, cells_x, CHANNELS_LAST)
    has_row, has_column = row < rows, column < (channels if CHANNELS_LAST else cells_x)
    values = input + offset(image, channel, cell_y, cell_x, input_n, input_c, input_y, input_x)
    positions = indices + offset(image, channel, cell_y, cell_x, index_n, index_c, index_y, index_x)
    value_y, value_x = tl.cast(input_y, tl.int64), tl.cast(input_x, tl.int64)
    position_y, position_x = tl.cast(index_y, tl.int64), tl.cast(index_x, tl.int64)
    found_here = tl.zeros((ROWS, COLUMNS), tl.int32)
    for r in tl.static_range(STRIDE_H):
        y = cell_y * STRIDE_H - WINDOW[4] + r
        is_row = has_row & (y >= 0) & (y < height)
        x = cell_x * STRIDE_W - WINDOW[5]
        is_pixel = is_row & (has_column & (x >= 0) & (x < width))
        value, found_here = _from_windows(
            values, positions, value_y, value_x, position_y, position_x, has_row, has_column, cell_y, cell_x,
            windows_y, windows_x, (y * width + x).to(tl.int64), is_pixel, found_here, r, 0, WINDOW, SUM, COMPACT,
        )  # fmt: skip
        if STRIDE_W == 2:
            is_next = is_row & (has_column & (x >= -1) & (x < width - 1))
            following, found_here = _from_windows(
                values, positions, value_y, value_x, position_y, position_x, has_row, has_column, cell_y, cell_x,
                windows_y, windows_x, (y * width + x + 1).to(tl.int64), is_next, found_here, r, 1, WINDOW, SUM, COMPACT,
            )  # fmt: skip
            if CHANNELS_LAST:
                to = out + offset(image, channel, y, x + 1, out_n, out_c, out_y, out_x)
                tl.store(to, following.to(out.dtype.element_ty), mask=is_next)
            else:  # side by side
                value = tl.join(value, following).reshape(ROWS, 2 * COLUMNS)
                first = tl.program_id(0) % column_blocks * (2 * COLUMNS) - WINDOW[5]
                x = first + tl.arange(0, 2 * COLUMNS)[None, :]
                is_pixel = is_row & (x >= 0) & (x < width)
        to = out + offset(image, channel, y, x, out_n, out_c, out_y, out_x)
        tl.store(to, value.to(out.dtype.element_ty), mask=is_pixel)
    if not COMPACT:
        tl.atomic_add(found, tl.sum(found_here).to(tl.int64), sem="relaxed")


@triton.jit
def _max_unpool2d_any_stride_kernel(
    input, indices, out, found, channels,
    input_n, input_c, input_y, input_x, index_n, index_c, index_y, index_x, out_n, out_c, out_y, out_x,
    windows_y, windows_x, height, width, rows, column_blocks,
    WINDOW: tl.constexpr, ADAPTIVE: tl.constexpr, COVER_H: tl.constexpr, COVER_W: tl.constexpr, UNROLL: tl.constexpr,
    SUM: tl.constexpr, COMPACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of pixels, each with as many windows as cover any of them."""
    row, column = tile(tl.program_id(0), column_blocks, ROWS, COLUMNS, WIDE)
    image, channel, y, x = coordinates(row, column, channels, height, width, CHANNELS_LAST)
    has_row, has_column = row < rows, column < (channels if CHANNELS_LAST else width)
    oy, count_y = covering(y, height, windows_y, WINDOW[0], WINDOW[2], WINDOW[4], WINDOW[6], ADAPTIVE)
    ox, count_x = covering(x, width, windows_x, WINDOW[1], WINDOW[3], WINDOW[5], WINDOW[7], ADAPTIVE)
    values = input + offset(image, channel, oy, ox, input_n, input_c, input_y, input_x)
    positions = indices + offset(image, channel, oy, ox, index_n, index_c, index_y, index_x)
    value_y, value_x = tl.cast(input_y, tl.int64), tl.cast(input_x, tl.int64)
    position_y, position_x = tl.cast(index_y, tl.int64), tl.cast(index_x, tl.int64)
    # From the first window's start to the pixel: a tap, if it is a multiple of the dilation.
    reach_y, reach_x = y + WINDOW[4] - oy * WINDOW[2], x + WINDOW[5] - ox * WINDOW[3]
    pixel = (y * width + x).to(tl.int64)
    value = tl.zeros((ROWS, COLUMNS), tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32)
    found_here = tl.zeros((ROWS, COLUMNS), tl.int32)
    for k in tl.range(0, COVER_H * COVER_W, loop_unroll_factor=UNROLL):
        a, b = k // COVER_W, k % COVER_W
        i, j = reach_y - a * WINDOW[2], reach_x - b * WINDOW[3]
        asked_y, asked_x = has_row & (count_y > a), has_column & (count_x > b)
        if WINDOW[6] > 1:
            asked_y = asked_y & (i % WINDOW[6] == 0)
        if WINDOW[7] > 1:
            asked_x = asked_x & (j % WINDOW[7] == 0)
        asked = asked_y & asked_x
        index = tl.load(positions + (position_y * a + position_x * b), mask=asked)
        given = tl.load(values + (value_y * a + value_x * b), mask=asked).to(value.dtype)
        if COMPACT:
            here = asked & (index == i // WINDOW[6] * WINDOW[1] + j // WINDOW[7])
        else:
            here = asked & (index == pixel)
            found_here += here
        value = tl.where(here, value + given if SUM else given, value)
    to = out + offset(image, channel, y, x, out_n, out_c, out_y, out_x)
    tl.store(to, value.to(out.dtype.element_ty), mask=has_row & has_column)
    if not COMPACT:
        tl.atomic_add(found, tl.sum(found_here).to(tl.int64), sem="relaxed")


@triton.jit
def _max_unpool2d_backward_kernel(
    grad, indices, owners, out, channels, grad_n, grad_c, grad_y, grad_x, index_n, index_c, index_y, index_x,
    owner_n, owner_c, owner_y, owner_x, windows_y, windows_x, height, width, rows, column_blocks,
    WINDOW: tl.constexpr, COMPACT: tl.constexpr, OWNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, column = tile(tl.program_id(0), column_blocks, ROWS, COLUMNS, WIDE)
    image, channel, oy, ox = coordinates(row, column, channels, windows_y, windows_x, CHANNELS_LAST)
    columns = channels if CHANNELS_LAST else windows_x
    has_window = (row < rows) & (column < columns)
    index = tl.load(indices + offset(image, channel, oy, ox, index_n, index_c, index_y, index_x), mask=has_window)
    y, x, inside = pixel_of(index, oy, ox, height, width, WINDOW, COMPACT)
    inside = has_window & inside
    value = tl.load(grad + offset(image, channel, y, x, grad_n, grad_c, grad_y, grad_x), mask=inside)
    if OWNED:
        owner = tl.load(owners + offset(image, channel, y, x, owner_n, owner_c, owner_y, owner_x), mask=inside)
        value = tl.where(owner == oy * windows_x + ox, value, 0)
    value = tl.where(inside, value, nan_of(value))
    tl.store(out + row.to(tl.int64) * columns + (column if CHANNELS_LAST else ox), value, mask=has_window)


def max_unpool2d(input: Tensor, indices: Tensor, height: int, width: int, *rest) -> Tensor:
    *window, sum = rest
    _check(input, indices, window, height, width)
    if input.shape != indices.shape:
        raise RuntimeError("input: expected the size of the indices")
    out = empty((*input.shape[:2], height, width), input.dtype, input, is_channels_last(input))
    if input.numel() == 0:
        return out.zero_()
    with on_device_of(input):
        found = _by_windows(input, indices, window, sum, out)
        if indices.dtype == torch.int64:
            unpool_anywhere(input, indices, window, found, sum, out)
    return out


def _by_windows(input: Tensor, indices: Tensor, window: list[int], sum: bool, out: Tensor) -> Tensor:
    """By the windows that cover a pixel; how many flat indices were found so."""
    size, windows = out.shape[2:], input.shape[2:]
    compact, channels_last = indices.dtype == torch.uint8, is_channels_last(out)
    found = out if compact else torch.zeros((), dtype=torch.int64, device=out.device)
    maps = (input, indices, out, found, *strides(channels_last, input, indices, out), *windows, *size)
    constants = {"WINDOW": tuple(window), "SUM": sum, "COMPACT": compact}
    most_unrolled = _MOST_UNROLLED if compact else _MOST_UNROLLED_FLAT
    bins = window == _OF_BINS and not compact and all(s * w <= _MOST for s, w in zip(size, windows, strict=True))
    if not bins and max(window[2:4]) <= 2 and window[0] * window[1] <= most_unrolled:
        cells = [(size[d] - 1 + window[4 + d]) // window[2 + d] + 1 for d in (0, 1)]
        grid, tiling = tiles((*out.shape[:2], *cells), out.element_size(), channels_last)
        _max_unpool2d_kernel[grid](*maps, **tiling, cells_y=cells[0], cells_x=cells[1], **constants)
    else:
        cover = [most_covering(size[d], windows[d], *window[d::2], bins) for d in (0, 1)]
        unroll = cover[0] * cover[1] if cover[0] * cover[1] <= most_unrolled else 1
        constants |= {"ADAPTIVE": bins, "COVER_H": cover[0], "COVER_W": cover[1], "UNROLL": unroll}
        grid, tiling = tiles(out.shape, out.element_size(), channels_last)
        _max_unpool2d_any_stride_kernel[grid](*maps, **tiling, **constants)
    return found


def max_unpool2d_backward(grad: Tensor, indices: Tensor, *rest) -> Tensor:
    *window, sum = rest
    height, width = grad.shape[2:]
    _check(grad, indices, window, height, width)
    flat = indices.dtype == torch.int64
    channels_last = is_channels_last(grad)
    out = empty(indices.shape, grad.dtype, grad, channels_last)
    if out.numel() == 0:
        return out
    apart = all(window[2 + d] >= (window[d] - 1) * window[6 + d] + 1 for d in (0, 1))
    owned = not sum and (flat or not apart)
    with on_device_of(grad):
        owners = grad
        if owned:
            none = torch.zeros((), dtype=torch.int64, device=grad.device)
            owners = owners_of(indices, window, none, height, width, channels_last)
        grid, tiling = tiles(out.shape, out.element_size(), channels_last)
        maps = (grad, indices, owners, out, *strides(channels_last, grad, indices, owners))
        constants = {"WINDOW": tuple(window), "COMPACT": not flat, "OWNED": owned}
        _max_unpool2d_backward_kernel[grid](*maps, *indices.shape[2:], height, width, **constants, **tiling)
    return out


def _check(input: Tensor, indices: Tensor, window: list[int], height: int, width: int) -> None:
    if indices.dtype not in (torch.uint8, torch.int64):
        raise RuntimeError(f"indices: expected uint8 or int64, got {indices.dtype}")
    if indices.shape[:2] != input.shape[:2]:
        raise RuntimeError("indices: expected the images and channels of the input")
    check_window(window, height, width)
    windows = indices.shape[2:]
    if windows[0] * windows[1] > _MOST or any(
        n * stride > 2**40 for n, stride in zip(windows, window[2:4], strict=True)
    ):
        raise RuntimeError("indices: expected fewer than 2^31 per channel, and fewer for a large stride")


# ---- what is compiled ahead of time ----------------------------------------------------------------


_PAIRS = {"WINDOW": (2, 2, 2, 2, 0, 0, 1, 1)}
_STEM = {"WINDOW": (3, 3, 2, 2, 1, 1, 1, 1)}

VARIANTS = [
    unpool_variant(
        _max_unpool2d_kernel, "bf16", "u8", "gradient of 3x3, stride 2, 256x64x112x112, channels-last; 566 MB, 0.13 ms",
        input_c=1, index_c=1, out_c=1, SUM=True, **_STEM, **CHANNELS_LAST,
    ),
    unpool_variant(
        _max_unpool2d_kernel, "fp32", "i64", "2x2 to 8x64x256x256; 235 MB, 0.05 ms",
        input_x=1, index_x=1, out_x=1, SUM=False, **_PAIRS, **CONTIGUOUS,
    ),
    unpool_variant(
        _max_unpool2d_kernel, "fp16", "u8", "gradient of 5x5, stride 1, 64x256x20x20; 33 MB, 8 us",
        input_x=1, index_x=1, out_x=1, SUM=True, WINDOW=(5, 5, 1, 1, 2, 2, 1, 1), **CONTIGUOUS,
    ),
    unpool_variant(
        _max_unpool2d_any_stride_kernel, "fp32", "i64", "gradient of 7x7 bins, 64x512x14x14; 45 MB, 0.01 ms",
        input_x=1, index_x=1, out_x=1, ADAPTIVE=True, COVER_H=1, COVER_W=1, UNROLL=1, SUM=True,
        WINDOW=tuple(_OF_BINS), **CONTIGUOUS,
    ),
    unpool_variant(
        _max_unpool2d_backward_kernel, "fp32", "u8", "2x2 from 8x64x256x256; 176 MB in sectors, 0.04 ms",
        grad_x=1, index_x=1, owner_x=1, OWNED=False, **_PAIRS, **CONTIGUOUS,
    ),
    unpool_variant(
        _max_unpool2d_backward_kernel, "bf16", "i64", "2x2 from 8x64x256x256, channels-last; 352 MB, 0.08 ms",
        grad_c=1, index_c=1, owner_c=1, OWNED=True, **_PAIRS, **CHANNELS_LAST,
    ),
    *ANYWHERE_VARIANTS,
]  # fmt: skip
