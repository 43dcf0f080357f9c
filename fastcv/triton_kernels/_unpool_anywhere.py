"""Unpooling by flat indices one by one, which may point anywhere: what the kernels by windows leave undone.

Those count on the device the windows that they found. The kernels here are always launched and end at once where that
is all of them, so that nobody waits for the number. Else, of each pixel the last window that points at it is found with
an atomic maximum, of integers and so in any order the same; then each pixel is written once. Sums have no such kernels:
each pixel asks all windows of its plane, which takes long, but only gradients of pooling are sums, and their indices
point into their windows.

A kernel cannot raise: an index outside the map makes the first pixel of its plane NaN, and has NaN as its gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant
from ._pooling import coordinates, empty, is_channels_last, offset, pooling_variant, strides, tile, tiles

_PROGRAMS = 1024
_BLOCK = 1024
_OUTSIDE = tl.constexpr(2**31 - 1)  # an owner that is no window


@triton.jit
def pixel_of(index, oy, ox, height, width, WINDOW: tl.constexpr, COMPACT: tl.constexpr):
    """The pixel that an index names, y and x, and whether it is one; else the first."""
    if COMPACT:
        tap = index.to(tl.int32)
        y = oy * WINDOW[2] - WINDOW[4] + tap // WINDOW[1] * WINDOW[6]
        x = ox * WINDOW[3] - WINDOW[5] + tap % WINDOW[1] * WINDOW[7]
        inside = (tap < WINDOW[0] * WINDOW[1]) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    else:
        inside = (index >= 0) & (index < tl.cast(height, tl.int64) * width)
        pixel = tl.where(inside, index, 0).to(tl.int32)
        y, x = pixel // width, pixel % width
    return tl.where(inside, y, 0), tl.where(inside, x, 0), inside


@triton.jit
def nan_of(value):
    return tl.full((1, 1), float("nan"), tl.float32).to(value.dtype)


@triton.jit
def _sum_anywhere_kernel(
    input, indices, out, found, channels,
    input_n, input_c, input_y, input_x, index_n, index_c, index_y, index_x, out_n, out_c, out_y, out_x,
    windows_y, windows_x, height, width, rows, column_blocks, blocks, windows,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Each pixel asks all windows of its plane. Slow: no pooling gives such indices."""
    if tl.load(found) != windows:
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            row, column = tile(block, column_blocks, ROWS, COLUMNS, WIDE)
            image, channel, y, x = coordinates(row, column, channels, height, width, CHANNELS_LAST)
            mask = (row < rows) & (column < (channels if CHANNELS_LAST else width))
            pixel = (y * width + x).to(tl.int64)
            value = tl.zeros((ROWS, COLUMNS), tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32)
            zero = tl.zeros((1, 1), tl.int32)
            for window in range(0, windows_y * windows_x):
                oy, ox = zero + window // windows_x, zero + window % windows_x
                index = tl.load(
                    indices + offset(image, channel, oy, ox, index_n, index_c, index_y, index_x), mask=mask, other=0
                )
                given = tl.load(input + offset(image, channel, oy, ox, input_n, input_c, input_y, input_x), mask=mask)
                value = tl.where(index == pixel, value + given.to(value.dtype), value)
                outside = (index < 0) | (index >= tl.cast(height, tl.int64) * width)
                value = tl.where(outside & (pixel == 0), float("nan"), value)
            to = out + offset(image, channel, y, x, out_n, out_c, out_y, out_x)
            tl.store(to, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _no_owners_kernel(owners, found, pixels, blocks, windows, BLOCK: tl.constexpr):
    if tl.load(found) != windows:
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            i = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            tl.store(owners + i, -1, mask=i < pixels)


@triton.jit
def _owners_kernel(
    indices, owners, found, channels, index_n, index_c, index_y, index_x, owner_n, owner_c, owner_y, owner_x,
    windows_y, windows_x, height, width, rows, column_blocks, blocks, windows,
    WINDOW: tl.constexpr, COMPACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of each pixel the last window that points at it."""
    if tl.load(found) != windows:
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            row, column = tile(block, column_blocks, ROWS, COLUMNS, WIDE)
            image, channel, oy, ox = coordinates(row, column, channels, windows_y, windows_x, CHANNELS_LAST)
            mask = (row < rows) & (column < (channels if CHANNELS_LAST else windows_x))
            at = indices + offset(image, channel, oy, ox, index_n, index_c, index_y, index_x)
            y, x, inside = pixel_of(tl.load(at, mask=mask, other=0), oy, ox, height, width, WINDOW, COMPACT)
            owner = owners + offset(image, channel, y, x, owner_n, owner_c, owner_y, owner_x)
            tl.atomic_max(owner, tl.where(inside, oy * windows_x + ox, _OUTSIDE), mask=mask, sem="relaxed")


@triton.jit
def _from_owners_kernel(
    input, owners, out, found, channels, input_n, input_c, input_y, input_x, owner_n, owner_c, owner_y, owner_x,
    windows_x, height, width, rows, column_blocks, blocks, windows,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The values of the last windows."""
    if tl.load(found) != windows:
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            row, column = tile(block, column_blocks, ROWS, COLUMNS, WIDE)
            image, channel, y, x = coordinates(row, column, channels, height, width, CHANNELS_LAST)
            columns = channels if CHANNELS_LAST else width
            mask = (row < rows) & (column < columns)
            at = owners + offset(image, channel, y, x, owner_n, owner_c, owner_y, owner_x)
            owner = tl.load(at, mask=mask, other=-1)
            oy, ox = owner // windows_x, owner % windows_x
            given = input + offset(image, channel, oy, ox, input_n, input_c, input_y, input_x)
            value = tl.load(given, mask=mask & (owner >= 0) & (owner != _OUTSIDE), other=0)
            value = tl.where(owner == _OUTSIDE, nan_of(value), value)
            tl.store(out + row.to(tl.int64) * columns + (column if CHANNELS_LAST else x), value, mask=mask)


def owners_of(
    indices: Tensor, window: list[int], found: Tensor, height: int, width: int, channels_last: bool
) -> Tensor:
    """The last windows that point at pixels; of no meaning where all windows are ``found``."""
    owners = empty((*indices.shape[:2], height, width), torch.int32, indices, channels_last)
    pixels, windows = owners.numel(), indices.numel()
    blocks = triton.cdiv(pixels, _BLOCK)
    _no_owners_kernel[(min(blocks, _PROGRAMS),)](owners, found, pixels, blocks, windows, BLOCK=_BLOCK)
    maps = (indices, owners, found, *strides(channels_last, indices, owners), *indices.shape[2:], height, width)
    constants = {"WINDOW": tuple(window), "COMPACT": indices.dtype == torch.uint8}
    (blocks,), tiling = tiles(indices.shape, 4, channels_last)
    _owners_kernel[(min(blocks, _PROGRAMS),)](*maps, blocks=blocks, windows=windows, **tiling, **constants)
    return owners


def unpool_anywhere(input: Tensor, indices: Tensor, window: list[int], found: Tensor, sum: bool, out: Tensor) -> None:
    """Writes ``out`` unless all windows are ``found``."""
    channels_last = is_channels_last(out)
    (blocks,), tiling = tiles(out.shape, out.element_size(), channels_last)
    grid, tiling = (min(blocks, _PROGRAMS),), {"blocks": blocks, "windows": indices.numel(), **tiling}
    if sum:
        maps = (input, indices, out, found, *strides(channels_last, input, indices, out))
        _sum_anywhere_kernel[grid](*maps, *input.shape[2:], *out.shape[2:], **tiling)
    else:
        owners = owners_of(indices, window, found, *out.shape[2:], channels_last)
        maps = (input, owners, out, found, *strides(channels_last, input, owners))
        _from_owners_kernel[grid](*maps, input.shape[3], *out.shape[2:], **tiling)


# ---- what is compiled ahead of time ----------------------------------------------------------------


def unpool_variant(kernel, dtype: str, indices: str, note: str, **constants) -> Variant:
    types = {name: f"*{dtype}" for name in ("input", "grad", "out")}
    types |= {"indices": f"*{indices}", "owners": "*i32", "found": "*i64"}
    if "COMPACT" in kernel.arg_names:
        constants["COMPACT"] = indices == "u8"
    types = {name: type for name, type in types.items() if name in kernel.arg_names}
    return pooling_variant(kernel, types, note, **constants)


CONTIGUOUS = {"channels": 1, "column_blocks": 1, "CHANNELS_LAST": False, "ROWS": 4, "COLUMNS": 128}
CHANNELS_LAST = {"column_blocks": 1, "CHANNELS_LAST": True, "ROWS": 16, "COLUMNS": 64}

VARIANTS = [
    unpool_variant(
        _sum_anywhere_kernel, "fp32", "i64", "nothing, as all were found",
        input_x=1, index_x=1, out_x=1, **CONTIGUOUS,
    ),
    Variant(
        _no_owners_kernel, {"owners": "*i32", "found": "*i64", "pixels": "i32", "blocks": "i32", "windows": "i32"},
        {"BLOCK": _BLOCK}, note="8x64x256x256; 134 MB, 0.03 ms",
    ),
    unpool_variant(
        _owners_kernel, "fp32", "i64", "2x2 to 8x64x256x256; 67 MB of indices and 134 MB to update, 0.08 ms",
        index_x=1, owner_x=1, WINDOW=(2, 2, 2, 2, 0, 0, 1, 1), **CONTIGUOUS,
    ),
    unpool_variant(
        _from_owners_kernel, "fp32", "i64", "8x64x256x256; 302 MB, 0.07 ms",
        input_x=1, owner_x=1, **CONTIGUOUS,
    ),
]  # fmt: skip
