"""Resampling of maps to another size, and its gradient.

A program writes some pixels of some channels; what is dense in memory is written densely, pixels of contiguous maps and
channels of channels-last ones. Where a pixel comes from is computed once for all its channels, for rows and columns
alike, in torch's arithmetic. It is read where it lies: neighbours share what they read in the first-level cache.

The gradient gathers: an input's is a sum over those outputs that it has a part in, rows after rows, and written once.
They are found from the inverse of the map from outputs to inputs, widened by its error of rounding; an output that is
none of them has the weight 0 and is not read.

1 x 64 x 128 x 128 to 256 x 256 in float32: 4 MB read and 17 MB written, floor 5 us on an H200, and the same backward.
Operations: 30 for a pixel and 3 to 8 for each of its channels; backward 10 and 3 for each of 16 outputs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant, on_device_of

_WARPS = 8
_BLOCK = 4096  # elements of a program: a thread of a contiguous map has some channels of some pixels,
_BLOCK_LAST = 2048  # and one of a channels-last map those of one; gradients need registers for windows as well
_LONGER = 4 if triton.knobs.runtime.interpret else 1  # the interpreter's time goes by programs


@triton.jit
def _coordinate(o, step, KIND: tl.constexpr, SUMS: tl.constexpr):
    """Of the centres of outputs, among inputs."""
    scale = tl.full((), step, SUMS)
    return o.to(SUMS) * scale if KIND == "aligned" else tl.maximum(scale * (o.to(SUMS) + 0.5) - 0.5, 0)


@triton.jit
def _source(o, size, out, step, KIND: tl.constexpr, SUMS: tl.constexpr):
    """Of an axis' outputs: the input they come from, -1 for none, and the weight of the one after it."""
    weight = tl.zeros(o.shape, SUMS)
    if KIND == "same":
        low = o
    elif KIND == "bed_of_nails":
        low = tl.where(o % (out // size) == 0, o // (out // size), -1)
    elif KIND == "nearest":
        low = (o.to(tl.float32) * tl.full((), step, tl.float32)).to(tl.int32)
        low = tl.maximum(0, tl.minimum(low, size - 1))
    else:
        at = _coordinate(o, step, KIND, SUMS)
        low = tl.maximum(0, tl.minimum(at.to(tl.int32), size - 1))
        weight = tl.minimum(at - low, 1)
    return low, weight


@triton.jit
def _outputs(i, size, out, step, inverse, slack, KIND: tl.constexpr, SUMS: tl.constexpr):
    """Of an axis' inputs: the first of the outputs they may have a part in, and the one after the last."""
    if KIND == "same":
        first = i
        end = i + 1
    elif KIND == "bed_of_nails":
        first = i * (out // size)
        end = first + 1
    else:
        scale = tl.full((), inverse, SUMS)
        low = i.to(SUMS)
        high = low + 1
        if KIND != "nearest":
            low -= 1
        if KIND == "bilinear":
            low += 0.5 - 0.5 / scale
            high += 0.5 - 0.5 / scale
        most = 2147483520.0  # float32's greatest below 2^31
        widening = tl.full((), slack, SUMS)
        first = tl.minimum(tl.maximum(tl.ceil(low * scale - widening), 0), most).to(tl.int32)
        end = tl.minimum(tl.maximum(tl.ceil(high * scale + widening), 0), most).to(tl.int32)
        first = tl.where(i == 0, 0, first)
        end = tl.where(i >= size - 1, out, tl.minimum(end, out))  # what lies beyond the ends is theirs
    return first, end


@triton.jit
def _part(o, i, size, out, step, KIND: tl.constexpr, SUMS: tl.constexpr):
    """Weights of inputs i in outputs o."""
    if KIND == "nearest":
        return tl.where(_source(o, size, out, step, KIND, SUMS)[0] == i, 1, 0).to(SUMS)
    elif KIND == "aligned" or KIND == "bilinear":
        at = tl.minimum(_coordinate(o, step, KIND, SUMS), tl.full((), size - 1, SUMS))
        return tl.maximum(1 - tl.abs(at - i), 0)
    else:
        return tl.full(o.shape, 1, SUMS)


@triton.jit
def _pixels(first, width, PIXELS: tl.constexpr):
    """Rows and columns of PIXELS pixels from ``first`` on, divided as 32-bit numbers."""
    x = (first % width).to(tl.int32) + tl.arange(0, PIXELS)
    return (first // width).to(tl.int32) + x // width, x % width


@triton.jit
def _interpolate_kernel(
    input, output, channels, height, width, out_height, out_width, pixels, stride_n, stride_c, stride_y, stride_x,
    out_n, out_c, out_p, channel_blocks, pixel_blocks, step_h: tl.float64, step_w: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    SUMS: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    BLENDS_ROWS: tl.constexpr = ROWS == "bilinear" or ROWS == "aligned"
    BLENDS_COLUMNS: tl.constexpr = COLUMNS == "bilinear" or COLUMNS == "aligned"
    program = tl.program_id(0)
    image = (program // pixel_blocks // channel_blocks).to(tl.int64)
    c = program // pixel_blocks % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    first = (program % pixel_blocks).to(tl.int64) * PIXELS
    pixel = first + tl.arange(0, PIXELS)
    out_y, out_x = _pixels(first, out_width, PIXELS)
    y, below = _source(out_y, height, out_height, step_h, ROWS, SUMS)
    x, right = _source(out_x, width, out_width, step_w, COLUMNS, SUMS)
    mask = (c < channels)[:, None] & (pixel < pixels)[None, :]
    seen = mask & ((y >= 0) & (x >= 0))[None, :]
    at = input + image * stride_n + (c.to(tl.int64) * stride_c)[:, None]
    at += (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x)[None, :]
    value = tl.load(at, mask=seen, other=0).to(SUMS)
    to_right = tl.where(x + 1 < width, stride_x, 0)[None, :]  # the last stands for the one after it
    if BLENDS_COLUMNS:
        value = (1 - right)[None, :] * value + right[None, :] * tl.load(at + to_right, mask=seen, other=0).to(SUMS)
    if BLENDS_ROWS:
        at += tl.where(y + 1 < height, stride_y, 0)[None, :]
        lower = tl.load(at, mask=seen, other=0).to(SUMS)
        if BLENDS_COLUMNS:
            lower = (1 - right)[None, :] * lower + right[None, :] * tl.load(at + to_right, mask=seen, other=0).to(SUMS)
        value = (1 - below)[None, :] * value + below[None, :] * lower
    to = output + image * out_n + (c.to(tl.int64) * out_c)[:, None] + (pixel * out_p)[None, :]
    tl.store(to, value.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _interpolate_backward_kernel(
    grad, output, channels, height, width, out_height, out_width, pixels, grad_n, grad_c, grad_y, grad_x,
    out_n, out_c, out_p, channel_blocks, pixel_blocks, step_h: tl.float64, step_w: tl.float64,
    inverse_h: tl.float64, inverse_w: tl.float64, slack_h: tl.float64, slack_w: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """``output``: the gradient of the input, of height x width; ``grad``: that of the outputs, TAPS of a row a time."""
    SUMS: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    image = (program // pixel_blocks // channel_blocks).to(tl.int64)
    c = program // pixel_blocks % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    first = (program % pixel_blocks).to(tl.int64) * PIXELS
    pixel = first + tl.arange(0, PIXELS)
    inside = pixel < pixels
    y, x = _pixels(first, width, PIXELS)
    top, bottom = _outputs(y, height, out_height, step_h, inverse_h, slack_h, ROWS, SUMS)
    left, right = _outputs(x, width, out_width, step_w, inverse_w, slack_w, COLUMNS, SUMS)
    of_channel = grad + image * grad_n + (c.to(tl.int64) * grad_c)[:, None]
    is_channel = (c < channels)[:, None]
    sums = tl.zeros((CHANNELS, PIXELS), SUMS)
    for i in range(0, tl.max(tl.where(inside, bottom - top, 0))):
        row = top + i
        of_row = tl.where(inside & (row < bottom), _part(row, y, height, out_height, step_h, ROWS, SUMS), 0)
        at_row = of_channel + (row.to(tl.int64) * grad_y)[None, :]
        for j in range(0, tl.max(tl.where(inside, right - left, 0)), TAPS):
            if TAPS == 1:
                column = left + j
                weight = of_row * _part(column, x, width, out_width, step_w, COLUMNS, SUMS)
                weight = tl.where(column < right, weight, 0)[None, :]
                at = at_row + (column.to(tl.int64) * grad_x)[None, :]
                sums += weight * tl.load(at, mask=is_channel & (weight != 0), other=0).to(SUMS)
            else:
                column = left[:, None] + (j + tl.arange(0, TAPS))[None, :]
                weight = of_row[:, None] * _part(column, x[:, None], width, out_width, step_w, COLUMNS, SUMS)
                weight = tl.where(column < right[:, None], weight, 0)[None, :, :]
                at = at_row[:, :, None] + (column.to(tl.int64) * grad_x)[None, :, :]
                value = tl.load(at, mask=is_channel[:, :, None] & (weight != 0), other=0).to(SUMS)
                sums += tl.sum(weight * value, 2)
    to = output + image * out_n + (c.to(tl.int64) * out_c)[:, None] + (pixel * out_p)[None, :]
    tl.store(to, sums.to(output.dtype.element_ty), mask=is_channel & inside[None, :])


# ---- launchers ---------------------------------------------------------------------------------------


def _axis(mode: str, align_corners: bool, size: int, out: int, scale: float) -> tuple[str, float, float, float]:
    """The kind of an axis, inputs to an output, outputs to an input, and how far rounding may move the latter."""
    if mode == "bed_of_nails" and out % size:
        raise RuntimeError(f"output_size: expected multiples of the input's size, got {out} for {size}")
    if mode == "bed_of_nails" or (mode == "bilinear" and size == out):
        return "same" if mode == "bilinear" else mode, 1.0, 1.0, 0.0
    if mode == "bilinear" and align_corners:
        step = (size - 1) / max(1, out - 1)
    else:
        step = 1 / scale if scale > 0 else size / out
    inverse = 1 / step if step > 0 else float(out)
    exact = math.frexp(step)[0] == 0.5 and out < 2**22
    kind = "aligned" if mode == "bilinear" and align_corners else mode
    return kind, step, inverse, 0.0 if exact else max(2**-6, out * 2**-20)


def _blocks(channels: int, pixels: int, taps: int, channels_last: bool, backward: bool) -> tuple[int, int, int, int]:
    """Channels, pixels and taps of a program, and its warps. Few taps are taken one by one."""
    taps = min(64, triton.next_power_of_2(taps)) if taps > 8 else 1
    block = _BLOCK_LAST if channels_last or backward else _BLOCK
    channels, pixels = triton.next_power_of_2(channels), triton.next_power_of_2(pixels)
    if channels_last:
        channels = min(128, channels, block // taps)
        pixels = min(_LONGER * block // taps // channels, pixels)
    else:
        pixels = min(_LONGER * 256 // taps, pixels)
        channels = min(_LONGER * block // taps // pixels, channels)
    return channels, pixels, taps, max(1, _WARPS * channels * pixels * taps // block)


def _check(x: Tensor, size: list[int], mode: str) -> None:
    if x.dim() != 4 or min(x.shape[2:]) < 1:
        raise RuntimeError(f"input or gradient: expected [N, C, H, W] with at least one pixel, got {list(x.shape)}")
    if len(size) != 2 or min(size) < 1 or max(*size, *x.shape[2:]) >= 2**31 - 2**10:
        raise RuntimeError(f"size: expected two positive numbers below 2^31, got {list(size)}")
    if mode not in ("nearest", "bilinear", "bed_of_nails"):
        raise RuntimeError(f'mode: expected "nearest", "bilinear" or "bed_of_nails", got "{mode}"')


def _run(x: Tensor, backward: bool, size: list[int], scale_h: float, scale_w: float, mode: str, align_corners: bool):
    """Either direction, to a map of ``size``."""
    _check(x, size, mode)
    small, large = (size, x.shape[2:]) if backward else (x.shape[2:], size)
    memory_format = torch._prims_common.suggest_memory_format(x)
    out = torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=memory_format)
    rows, *of_rows = _axis(mode, align_corners, small[0], large[0], scale_h)
    columns, *of_columns = _axis(mode, align_corners, small[1], large[1], scale_w)
    if out.numel() == 0:
        return out
    images, channels, pixels = *x.shape[:2], size[0] * size[1]
    taps = math.ceil(2 * of_columns[1]) if backward else 1
    *block, taps, num_warps = _blocks(channels, pixels, taps, memory_format == torch.channels_last, backward)
    blocks = triton.cdiv(channels, block[0]), triton.cdiv(pixels, block[1])
    numbers = [n for pair in zip(of_rows, of_columns, strict=True) for n in pair]
    constants = dict(ROWS=rows, COLUMNS=columns, CHANNELS=block[0], PIXELS=block[1], num_warps=num_warps)
    y = out.flatten(2)
    with on_device_of(x):
        if backward:
            _interpolate_backward_kernel[(images * blocks[0] * blocks[1],)](
                x, y, channels, *small, *large, pixels, *x.stride(), *y.stride(), *blocks, *numbers, TAPS=taps,
                **constants,
            )  # fmt: skip
        else:
            _interpolate_kernel[(images * blocks[0] * blocks[1],)](
                x, y, channels, *small, *large, pixels, *x.stride(), *y.stride(), *blocks, *numbers[:2], **constants
            )
    return out


def interpolate(
    input: Tensor, output_size: list[int], scale_h: float, scale_w: float, mode: str, align_corners: bool
) -> Tensor:
    return _run(input, False, output_size, scale_h, scale_w, mode, align_corners)


def interpolate_backward(
    grad: Tensor, input_size: list[int], scale_h: float, scale_w: float, mode: str, align_corners: bool
) -> Tensor:
    return _run(grad, True, input_size, scale_h, scale_w, mode, align_corners)


# ---- compiled ahead ------------------------------------------------------------------------------------


def _variant(dtype: str, kind: str, channels_last: bool, note: str, backward: bool = False, taps: int = 1) -> Variant:
    """Of 64 channels; contiguous or channels-last."""
    kernel = _interpolate_backward_kernel if backward else _interpolate_kernel
    *block, taps, num_warps = _blocks(64, 2**14, taps, channels_last, backward)
    constants = {"ROWS": kind, "COLUMNS": kind, "CHANNELS": block[0], "PIXELS": block[1]}
    constants |= {"out_c" if channels_last else "out_p": 1}
    constants |= {f"{'grad' if backward else 'stride'}_{'c' if channels_last else 'x'}": 1}
    if backward:
        constants["TAPS"] = taps
    types = {name: "fp64" if name.split("_")[0] in ("step", "inverse", "slack") else "i32" for name in kernel.arg_names}
    types |= {name: f"*{dtype}" for name in ("input", "grad", "output") if name in types}
    types = {name: value for name, value in types.items() if name not in constants}
    divisible = tuple(n for n in types if n.startswith(("stride", "grad_", "out_")) or n in ("channels", "pixels"))
    return Variant(kernel, types, constants, divisible, num_warps=num_warps, note=note)


VARIANTS = [
    _variant("fp32", "bilinear", False, "1 x 64 x 128 x 128 to 256 x 256; 21 MB: 5 us"),
    _variant("fp16", "bilinear", True, "1 x 64 x 128 x 128 to 256 x 256, channels-last; 10 MB: 2.5 us"),
    _variant("bf16", "nearest", False, "1 x 64 x 128 x 128 to 256 x 256; 10 MB: 2.5 us"),
    _variant("fp64", "aligned", False, "1 x 64 x 128 x 128 to 256 x 256; 42 MB: 10 us"),
    _variant("fp32", "bilinear", False, "1 x 64 x 256 x 256 to 128 x 128; 21 MB: 5 us", backward=True),
    _variant("fp16", "bilinear", True, "1 x 64 x 256 x 256 to 128 x 128, channels-last; 2.5 us", backward=True),
    _variant("bf16", "nearest", False, "1 x 64 x 256 x 256 to 128 x 128; 10 MB: 2.5 us", backward=True),
    _variant("fp32", "bilinear", False, "1 x 256 x 65 x 65 to 1 x 1; 4 MB: 1 us", backward=True, taps=130),
    _variant("fp64", "aligned", False, "1 x 64 x 256 x 256 to 128 x 128; 42 MB: 10 us", backward=True),
]
