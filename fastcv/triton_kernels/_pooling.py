"""What the pooling kernels share: maps as matrices, tiles of them, and the checks of windows.

A dense map is a matrix: a contiguous one has the rows of its planes with x as columns, a channels-last one its pixels
with channels as columns. A program writes a tile, and neighbouring lanes write neighbouring elements in both. Inputs
are read by their strides, so that none is copied. Image, channel, y and x vary along rows or columns alone: what is
computed of them costs little, whatever it is, and may as well be in 64 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._pooling import pooled_size
from ._launch import Variant

_MOST = 2**31 - 1
MOST_PIXELS = 2**31 - 2**10  # of a map and of a window: a block of them may end beyond
# The interpreter's time goes by the number of programs.
_INTERPRETED = triton.knobs.runtime.interpret
_THREADS = 16384 if _INTERPRETED else 128  # of a program
_WIDTHS = (64,) if _INTERPRETED else (16, 32, 64, 128)  # of a tile
_ELEMENTS = 1 << 17 if _INTERPRETED else 1024  # of a program with long windows
_CHANNELS = (512,) if _INTERPRETED else (8, 16, 32)  # of such a program
_MANY_PROGRAMS = 2 if _INTERPRETED else 512  # keep a device busy
MOST_TAPS = 64  # of windows that are not long


@triton.jit
def tile(block, column_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Rows ``[ROWS, 1]`` and columns ``[1, COLUMNS]`` of a block, usually the program's."""
    first = block // column_blocks
    row = (first.to(tl.int64) if WIDE else first) * ROWS + tl.arange(0, ROWS)
    column = block % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    return row[:, None], column[None, :]


@triton.jit
def coordinates(row, column, channels, height, width, CHANNELS_LAST: tl.constexpr):
    """Image, channel, y and x of elements of a map of this size."""
    if CHANNELS_LAST:
        image, channel = row // width // height, column
        y, x = (row // width % height).to(tl.int32), (row % width).to(tl.int32)
    else:
        image, channel = row // height // channels, row // height % channels
        y, x = (row % height).to(tl.int32), column
    return image, channel, y, x


@triton.jit
def offset(image, channel, y, x, stride_n, stride_c, stride_y, stride_x):
    at = image.to(tl.int64) * stride_n + y.to(tl.int64) * stride_y
    return at + channel.to(tl.int64) * stride_c + x.to(tl.int64) * stride_x


@triton.jit
def window_of(o, pixels, windows, stride, padding, ADAPTIVE: tl.constexpr):
    """Where a window of an axis starts, perhaps outside, and where its pixels or those of the map end."""
    if ADAPTIVE:
        return o * pixels // windows, ((o + 1) * pixels - 1) // windows + 1
    else:
        return o * stride - padding, pixels


@triton.jit
def covering(
    pixel, pixels, windows,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, ADAPTIVE: tl.constexpr,
):  # fmt: skip
    """The first window of an axis that may cover a pixel, and how many there are from it on."""
    if ADAPTIVE:
        first, last = pixel * windows // pixels, ((pixel + 1) * windows - 1) // pixels
    else:
        before = pixel + PADDING - (KERNEL - 1) * DILATION
        first, last = tl.where(before > 0, (before - 1) // STRIDE + 1, 0), (pixel + PADDING) // STRIDE
    return first, tl.minimum(last, windows - 1) - first + 1


@triton.jit
def outputs_of_program(
    outputs, channels, height, width, CHANNELS_LAST: tl.constexpr, OUTPUTS: tl.constexpr, WIDE: tl.constexpr
):
    """Where the ``[OUTPUTS, 1]`` elements of a dense map lie that a program writes, which ones there are, and their
    coordinates."""
    block = tl.program_id(0)
    if CHANNELS_LAST:  # some channels of one pixel
        blocks = (channels + OUTPUTS - 1) // OUTPUTS
        row = (block // blocks).to(tl.int64) if WIDE else block // blocks
        column = block % blocks * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]
        to, has_output = row * channels + column, column < channels
    else:
        to = (block.to(tl.int64) if WIDE else block) * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]
        row, column, has_output = to // width, (to % width).to(tl.int32), to < outputs
    image, channel, y, x = coordinates(row, column, channels, height, width, CHANNELS_LAST)
    return to, has_output, image, channel, y, x


def is_channels_last(map: Tensor) -> bool:
    return torch._prims_common.suggest_memory_format(map) == torch.channels_last


def empty(shape: Sequence[int], dtype: torch.dtype, like: Tensor, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


def strides(channels_last: bool, *maps: Tensor) -> list[int]:
    """Channels of an image and the strides of each map. Planes at one stride are images of one channel: kernels then
    need not find out which image a plane is of."""
    channels = maps[0].shape[1]
    if not channels_last and all(m.stride(0) == channels * m.stride(1) for m in maps):
        return [1, *(s for m in maps for s in (m.stride(1), 0, m.stride(2), m.stride(3)))]
    return [channels, *(s for m in maps for s in m.stride())]


def tiles(shape: Sequence[int], itemsize: int, channels_last: bool) -> tuple[tuple[int], dict]:
    """The grid of programs that write a map of this shape, and what their kernel needs to know of it."""
    images, channels, height, width = shape
    rows, columns = (images * height * width, channels) if channels_last else (images * channels * height, width)
    across = _fewest_idle(columns, _WIDTHS)
    # Of a channels-last map a thread has 16 bytes side by side; small maps are spread over more programs.
    elements = _THREADS * 16 // itemsize
    if rows * columns < _MANY_PROGRAMS * elements:
        elements = _THREADS
    down = min(max(1, elements // across), triton.next_power_of_2(rows))
    across = min(max(across, elements // down), triton.next_power_of_2(columns))  # few rows
    blocks = triton.cdiv(columns, across)
    constants = {"CHANNELS_LAST": channels_last, "ROWS": down, "COLUMNS": across, "WIDE": rows > _MOST - down}
    return (triton.cdiv(rows, down) * blocks,), {"rows": rows, "column_blocks": blocks, **constants}


def long_tiles(out: Tensor, channels_last: bool, taps: int) -> tuple[tuple[int], dict]:
    """The same of programs whose lanes also share a window's taps."""
    outputs, channels, taps = out.numel(), out.shape[1], triton.next_power_of_2(taps)
    # Of one pixel of a channels-last map: a cache line's channels or a sector's.
    count = _fewest_idle(channels, _CHANNELS) if channels_last else max(1, _ELEMENTS // taps)
    least = 8 if channels_last else 1
    while count > least and outputs < _MANY_PROGRAMS * count:
        count //= 2
    programs = triton.cdiv(channels, count) * (outputs // channels) if channels_last else triton.cdiv(outputs, count)
    constants = {"CHANNELS_LAST": channels_last, "OUTPUTS": count, "TAPS": min(_ELEMENTS // count, taps)}
    return (programs,), {"outputs": outputs, **constants, "WIDE": outputs > _MOST - count}


def _fewest_idle(columns: int, sizes: Sequence[int]) -> int:
    """Of these sizes of blocks the one that leaves the fewest lanes without a column, and of those the widest."""
    size = min(sizes, key=lambda size: (triton.cdiv(columns, size) * size, -size))
    return min(size, triton.next_power_of_2(columns))


def longest_bin(pixels: int, bins: int) -> int:
    """Pixels of the longest of an axis; with the two exchanged, how many bins share a pixel at most."""
    return triton.cdiv(pixels - math.gcd(pixels, bins), bins) + 1


def most_covering(
    pixels: int, windows: int, kernel: int, stride: int, padding: int, dilation: int, adaptive: bool
) -> int:
    """How many windows of an axis cover a pixel at most."""
    if adaptive:
        return longest_bin(windows, pixels)
    return min(windows, triton.cdiv((kernel - 1) * dilation + 1, stride))


def check_window(window: Sequence[int], height: int, width: int) -> None:
    """What kernels count on: they count pixels and elements of windows in 32 bits."""
    if height < 1 or width < 1 or height * width > MOST_PIXELS:
        raise RuntimeError(f"input: expected 1 to 2^31 - 2^10 pixels per channel, got {height} x {width}")
    for d in (0, 1):
        kernel, stride, padding, dilation = window[d::2]
        if not (
            kernel > 0 and stride > 0 and dilation > 0 and kernel * dilation <= _MOST and stride <= _MOST
            and 0 <= padding <= (kernel - 1) * dilation and (height, width)[d] + 2 * padding <= _MOST
        ):  # fmt: skip
            raise RuntimeError(
                "kernel_size, stride, dilation: expected positive numbers; padding: less than the kernel's reach"
            )
    if window[0] * window[1] > MOST_PIXELS:
        raise RuntimeError("kernel_size: expected at most 2^31 - 2^10 elements")


def pooled_sizes(height: int, width: int, window: Sequence[int], ceil_mode: bool) -> tuple[int, int]:
    """Rows and columns of windows, at least one of each."""
    check_window(window, height, width)
    sizes = tuple(pooled_size(size, d, window, ceil_mode) for d, size in enumerate((height, width)))
    for size, windows in zip((height, width), sizes, strict=True):
        if windows < 1:
            raise RuntimeError(f"kernel_size: expected a window that fits into the padded input of {size} pixels")
    return sizes


def pooling_variant(kernel: triton.JITFunction, types: dict[str, str], note: str, **constants) -> Variant:
    """All numbers that are no constants are in 32 bits, and multiples of 16 as sizes of maps are."""
    constants = {"WIDE": False, **constants}
    numbers = dict.fromkeys((n for n in kernel.arg_names if n not in types and n not in constants), "i32")
    return Variant(kernel, types | numbers, constants, tuple(numbers), note=note)
