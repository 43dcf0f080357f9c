"""Average pooling and its gradient.

A program has a tile of windows and adds up their taps in reading order, in float32, or float64 for float64; taps that
windows share come from the first-level cache. Windows of many taps, and those of adaptive pooling, are added up by the
lanes of a program. The gradient is gathered: each pixel adds up the shares of the windows that cover it and is written
once.

Moved: each pixel once in, each mean once out, and the reverse. 2x2 over 64x256x56x56 in float16 (DenseNet's first
transition): 103 MB in, 26 MB out, 0.03 ms on a card that copies 4.3 TB/s; about 50 instructions for each of 13 M
windows, 0.02 ms at 30 T a second.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops._pooling import pooled_size
from ._launch import on_device_of
from ._pooling import (
    MOST_TAPS,
    check_window,
    coordinates,
    covering,
    empty,
    is_channels_last,
    long_tiles,
    most_covering,
    offset,
    outputs_of_program,
    pooled_sizes,
    pooling_variant,
    strides,
    tile,
    tiles,
    window_of,
)

_MOST_UNROLLED = 25  # windows that cover a pixel


@triton.jit
def _divided(x, y):
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def _length(start, kernel, pixels, padding, INCLUDE_PAD: tl.constexpr):
    """How many elements count along an axis: what stands out of the padding does not."""
    end = tl.minimum(start + kernel, pixels + padding)
    return end - start if INCLUDE_PAD else tl.minimum(end, pixels) - tl.maximum(start, 0)


@triton.jit
def _avg_pool2d_kernel(
    input, out, channels, stride_n, stride_c, stride_y, stride_x, height, width, out_height, out_width,
    rows, column_blocks, WINDOW: tl.constexpr, INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, column = tile(tl.program_id(0), column_blocks, ROWS, COLUMNS, WIDE)
    image, channel, oy, ox = coordinates(row, column, channels, out_height, out_width, CHANNELS_LAST)
    columns = channels if CHANNELS_LAST else out_width
    if not CHANNELS_LAST:
        ox = tl.minimum(ox, columns - 1)  # a lane has one mean, not several: see max_pool2d.py
    y0, x0 = oy * WINDOW[2] - WINDOW[4], ox * WINDOW[3] - WINDOW[5]
    has_row, has_column = row < rows, column < columns
    at = input + offset(image, channel, y0, x0, stride_n, stride_c, stride_y, stride_x)
    step_y, step_x = tl.cast(stride_y, tl.int64), tl.cast(stride_x, tl.int64)
    sum = tl.zeros((ROWS, COLUMNS), tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32)
    TAPS: tl.constexpr = WINDOW[1]  # Triton 3.6 knows it inside of the loop by a name alone
    for i in tl.range(0, WINDOW[0], loop_unroll_factor=WINDOW[0] if WINDOW[0] * WINDOW[1] <= 16 else 1):
        in_rows = has_row & (y0 + i >= 0) & (y0 + i < height)
        for j in tl.static_range(TAPS):
            inside = in_rows & (has_column & (x0 + j >= 0) & (x0 + j < width))
            sum += tl.load(at + (i * step_y + j * step_x), mask=inside, other=0).to(sum.dtype)
    if DIVISOR == 0:
        length_y = _length(y0, WINDOW[0], height, WINDOW[4], INCLUDE_PAD).to(sum.dtype)
        mean = _divided(sum, length_y * _length(x0, WINDOW[1], width, WINDOW[5], INCLUDE_PAD).to(sum.dtype))
    else:
        mean = _divided(sum, tl.full((1, 1), DIVISOR, sum.dtype))
    to = out + row.to(tl.int64) * columns + (column if CHANNELS_LAST else ox)
    tl.store(to, mean.to(out.dtype.element_ty), mask=has_row & has_column)


@triton.jit
def _avg_pool2d_long_kernel(
    input, out, channels, stride_n, stride_c, stride_y, stride_x, height, width, out_height, out_width, outputs,
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w,
    ADAPTIVE: tl.constexpr, INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, OUTPUTS: tl.constexpr, TAPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    to, has_output, image, channel, oy, ox = outputs_of_program(
        outputs, channels, out_height, out_width, CHANNELS_LAST, OUTPUTS, WIDE
    )
    y0, end_y = window_of(oy, height, out_height, stride_h, padding_h, ADAPTIVE)
    x0, end_x = window_of(ox, width, out_width, stride_w, padding_w, ADAPTIVE)
    at = input + offset(image, channel, y0, x0, stride_n, stride_c, stride_y, stride_x)
    sum = tl.zeros((OUTPUTS, TAPS), tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32)
    taps = kernel_h * kernel_w
    for first in range(0, taps, TAPS):
        t = first + tl.arange(0, TAPS)[None, :]
        i, j = t // kernel_w, t % kernel_w
        y, x = y0 + i, x0 + j
        inside = has_output & (t < taps) & (y >= 0) & (y < end_y) & (x >= 0) & (x < end_x)
        step = i.to(tl.int64) * stride_y + j.to(tl.int64) * stride_x
        sum += tl.load(at + step, mask=inside, other=0).to(sum.dtype)
    if ADAPTIVE:
        length = (end_y - y0) * (end_x - x0)
    elif DIVISOR == 0:
        length = _length(y0, kernel_h, height, padding_h, INCLUDE_PAD)
        length *= _length(x0, kernel_w, width, padding_w, INCLUDE_PAD)
    else:
        length = tl.full((1, 1), DIVISOR, sum.dtype)
    mean = _divided(tl.sum(sum, axis=1, keep_dims=True), length.to(sum.dtype))
    tl.store(out + to, mean.to(out.dtype.element_ty), mask=has_output)


@triton.jit
def _share(o, pixels, windows, WINDOW: tl.constexpr, AXIS: tl.constexpr, INCLUDE_PAD: tl.constexpr,
           ADAPTIVE: tl.constexpr, type: tl.constexpr):  # fmt: skip
    """Along an axis, of a window: one by how many elements count."""
    start, end = window_of(o, pixels, windows, WINDOW[2 + AXIS], WINDOW[4 + AXIS], ADAPTIVE)
    length = end - start if ADAPTIVE else _length(start, WINDOW[AXIS], pixels, WINDOW[4 + AXIS], INCLUDE_PAD)
    length = tl.maximum(length, 1)  # that of no window may be 0
    return _divided(tl.full((1, 1), 1, type), length.to(type))


@triton.jit
def _avg_pool2d_backward_kernel(
    grad, out, channels, grad_n, grad_c, grad_y, grad_x, windows_y, windows_x, height, width, rows, column_blocks,
    WINDOW: tl.constexpr, ADAPTIVE: tl.constexpr, COVER_H: tl.constexpr, COVER_W: tl.constexpr, UNROLL: tl.constexpr,
    INCLUDE_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, column = tile(tl.program_id(0), column_blocks, ROWS, COLUMNS, WIDE)
    image, channel, y, x = coordinates(row, column, channels, height, width, CHANNELS_LAST)
    columns = channels if CHANNELS_LAST else width
    has_row, has_column = row < rows, column < columns
    oy, count_y = covering(y, height, windows_y, WINDOW[0], WINDOW[2], WINDOW[4], 1, ADAPTIVE)
    ox, count_x = covering(x, width, windows_x, WINDOW[1], WINDOW[3], WINDOW[5], 1, ADAPTIVE)
    at = grad + offset(image, channel, oy, ox, grad_n, grad_c, grad_y, grad_x)
    step_y, step_x = tl.cast(grad_y, tl.int64), tl.cast(grad_x, tl.int64)
    sum = tl.zeros((ROWS, COLUMNS), tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32)
    for k in tl.range(0, COVER_H * COVER_W, loop_unroll_factor=UNROLL):
        a, b = k // COVER_W, k % COVER_W
        covers = has_row & (count_y > a) & (has_column & (count_x > b))
        given = tl.load(at + (step_y * a + step_x * b), mask=covers, other=0).to(sum.dtype)
        if DIVISOR == 0:
            share_y = _share(oy + a, height, windows_y, WINDOW, 0, INCLUDE_PAD, ADAPTIVE, sum.dtype)
            share_x = _share(ox + b, width, windows_x, WINDOW, 1, INCLUDE_PAD, ADAPTIVE, sum.dtype)
            given *= share_y * share_x
        sum += given
    if DIVISOR != 0:
        sum = _divided(sum, tl.full((1, 1), DIVISOR, sum.dtype))
    to = out + row.to(tl.int64) * columns + (column if CHANNELS_LAST else x)
    tl.store(to, sum.to(out.dtype.element_ty), mask=has_row & has_column)


def avg_pool2d(input: Tensor, *rest) -> Tensor:
    *window, ceil_mode, count_include_pad, divisor = rest
    height, width = input.shape[2:]
    sizes = pooled_sizes(height, width, [*window, 1, 1], ceil_mode)
    channels_last = is_channels_last(input)
    out = empty((*input.shape[:2], *sizes), input.dtype, input, channels_last)
    if out.numel() and window[0] * window[1] > MOST_TAPS:
        long_avg_pool2d(input, out, window, INCLUDE_PAD=count_include_pad, DIVISOR=divisor, ADAPTIVE=False)
    elif out.numel():
        maps = (input, out, *strides(channels_last, input), height, width, *sizes)
        grid, tiling = tiles(out.shape, out.element_size(), channels_last)
        constants = {"INCLUDE_PAD": count_include_pad, "DIVISOR": divisor}
        with on_device_of(input):
            _avg_pool2d_kernel[grid](*maps, WINDOW=tuple(window), **constants, **tiling)
    return out


def long_avg_pool2d(input: Tensor, out: Tensor, window: list[int], **constants) -> None:
    """By the kernel of long windows; adaptive pooling's ``window`` is the longest bin."""
    channels_last = is_channels_last(input)
    grid, tiling = long_tiles(out, channels_last, window[0] * window[1])
    maps = (input, out, *strides(channels_last, input), *input.shape[2:], *out.shape[2:], tiling.pop("outputs"))
    with on_device_of(input):
        _avg_pool2d_long_kernel[grid](*maps, *window, **constants, **tiling)


def avg_pool2d_backward(grad: Tensor, height: int, width: int, *rest) -> Tensor:
    *window, count_include_pad, divisor = rest
    with_dilation = [*window, 1, 1]
    check_window(with_dilation, height, width)
    for d, size in enumerate((height, width)):
        fit = [max(0, pooled_size(size, d, with_dilation, ceil_mode)) for ceil_mode in (False, True)]
        if grad.shape[2 + d] not in fit:
            raise RuntimeError(f"grad: expected {fit[0]} or, with ceil_mode, {fit[1]} windows, got {grad.shape[2 + d]}")
    return gathered(grad, (height, width), window, INCLUDE_PAD=count_include_pad, DIVISOR=divisor, ADAPTIVE=False)


def gathered(grad: Tensor, size: tuple[int, int], window: list[int], **constants) -> Tensor:
    """The gradient of a map of this size; adaptive pooling has no ``window``."""
    channels_last, windows = is_channels_last(grad), grad.shape[2:]
    out = empty((*grad.shape[:2], *size), grad.dtype, grad, channels_last)
    if out.numel() == 0 or grad.numel() == 0:
        return out.zero_()
    cover = [most_covering(size[d], windows[d], *window[d::2], 1, constants["ADAPTIVE"]) for d in (0, 1)]
    unroll = cover[0] * cover[1] if cover[0] * cover[1] <= _MOST_UNROLLED else 1
    constants |= {"WINDOW": tuple(window), "COVER_H": cover[0], "COVER_W": cover[1], "UNROLL": unroll}
    grid, tiling = tiles(out.shape, out.element_size(), channels_last)
    maps = (grad, out, *strides(channels_last, grad), *windows, *size)
    with on_device_of(grad):
        _avg_pool2d_backward_kernel[grid](*maps, **constants, **tiling)
    return out


# ---- what is compiled ahead of time ----------------------------------------------------------------


def variant(kernel, dtype: str, note: str, **constants):
    constants = {"ADAPTIVE": False, "INCLUDE_PAD": True, "DIVISOR": 0, **constants}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    first = "input" if "input" in kernel.arg_names else "grad"
    return pooling_variant(kernel, {first: f"*{dtype}", "out": f"*{dtype}"}, note, **constants)


_CONTIGUOUS = {"channels": 1, "column_blocks": 1, "CHANNELS_LAST": False}
_CHANNELS_LAST = {"column_blocks": 1, "CHANNELS_LAST": True, "ROWS": 16, "COLUMNS": 64}
_PAIRS = (2, 2, 2, 2, 0, 0)
_THREES = (3, 3, 1, 1, 1, 1)

VARIANTS = [
    variant(
        _avg_pool2d_kernel, "fp16", "2x2, 64x256x56x56; 128 MB, 0.03 ms",
        WINDOW=_PAIRS, stride_x=1, ROWS=32, COLUMNS=32, **_CONTIGUOUS,
    ),
    variant(
        _avg_pool2d_kernel, "bf16", "3x3, stride 1, 64x192x35x35, channels-last; 60 MB, 0.014 ms",
        WINDOW=_THREES, stride_c=1, **_CHANNELS_LAST,
    ),
    variant(
        _avg_pool2d_long_kernel, "fp32", "17x17, stride 1, 1x3x540x960; 12 MB, 3 us, and 450 M taps",
        stride_x=1, channels=1, CHANNELS_LAST=False, OUTPUTS=2, TAPS=512,
    ),
    variant(
        _avg_pool2d_backward_kernel, "fp16", "gradient of 2x2, 64x256x56x56; 128 MB, 0.03 ms",
        WINDOW=_PAIRS, COVER_H=1, COVER_W=1, UNROLL=1, grad_x=1, ROWS=16, COLUMNS=64, **_CONTIGUOUS,
    ),
    variant(
        _avg_pool2d_backward_kernel, "bf16", "gradient of 3x3, stride 1, 64x192x35x35; 60 MB, 0.014 ms",
        WINDOW=_THREES, COVER_H=3, COVER_W=3, UNROLL=9, INCLUDE_PAD=False, grad_c=1, **_CHANNELS_LAST,
    ),
]  # fmt: skip
