"""Deformable convolution as a matrix product whose left operand is sampled from the input, never written out.

Rows are output pixels, columns the outputs of a group, the depth is units of channels (_deform.py) times kernel
elements (taps). A program computes a tile of ``BLOCK_M`` pixels by ``BLOCK_N`` outputs. For a tap and a unit it finds
the points of its pixels once, then takes ``BLOCK_K`` channels at a time: loads the four pixels around each point,
interpolates and modulates in float32, rounds to the type of the operands and multiplies by the weights on the matrix
unit. Sums are in float32, in one order. Where tiles are too few for the processors, the depth is split, and a second
kernel adds the parts in order.

Channels-last inputs are read in vectors along the channels; others where they lie, pixels side by side, and turned over
on their way to the matrix unit. Operands are of the type of input and weight, or float32 where these differ; float32
is "tf32x3" as in _implicit_gemm.py, or rounded to 11 bits where torch's setting allows it. Few channels in a group or
an offset group leave most of the matrix unit idle: a product is at least 16 channels deep and 16 outputs wide.

Bytes: input, offset, mask, weight and output once, as the four pixels around a point are shared with its neighbours in
the caches. Operations: 2 * pixels * outputs * depth on the matrix unit, and 10 for each sample outside of it, once for
every ``BLOCK_N`` outputs. 2 images of 256 channels, 100 x 136 pixels, to 256 channels with 3 x 3 in bfloat16: 29 MB,
7 us on an H200 (4.3 TB/s); 32 GFLOP, 41 us at 790 TFLOP/s; 63 M samples, in vectors of 16 bytes, 0.6 GFLOP and 0.5 GB
from the caches. Reasoned, not measured.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._convolution import INTERPRETED, Launch, ceil_div, in_64_bits, power_of_2, run, sum_type
from ._convolution import Problem as Convolution
from ._deform import (
    MASK_STRIDES,
    NUMBERS,
    OFFSET_STRIDES,
    Geometry,
    Layout,
    Shape,
    check_shape,
    example,
    insides,
    is_wide,
    laid_out,
    layout,
    locate,
    on_edge,
    operand,
    precision,
    sample,
    strides,
    triton_type,
)
from ._deform_backward import VARIANTS as _BACKWARD_VARIANTS
from ._deform_backward import deform_conv2d_backward as deform_conv2d_backward
from ._epilogue import finish, finish_launch
from ._implicit_gemm import tile_of


@triton.jit
def _sum_samples(
    input, weight, offset, mask, top, left, present, wanted, first_unit, units, unit, offset_units, height, width,
    stride_c, stride_h, stride_w, offset_c, mask_c, dilation_h, dilation_w, split, splits,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, EVEN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of sums over the ``split``-th part of taps and units, [BLOCK_M, BLOCK_N].

    ``input``, ``offset`` and ``mask`` point to each pixel's image, first offset and first factor, ``weight`` to the
    first tap of each filter; ``top`` and ``left`` are the position of the first tap without its offset.
    """
    AXIS: tl.constexpr = 1 if CHANNELS_LAST else 0  # of the channels in the input's tile
    SUM: tl.constexpr = tl.float64 if PRECISION == "double" else tl.float32
    along, down = tl.expand_dims(tl.arange(0, BLOCK_K), 1 - AXIS), tl.arange(0, BLOCK_K)[:, None]
    input, pixel = tl.expand_dims(input, AXIS), tl.expand_dims(present, AXIS)
    weight, wanted = weight[None, :] + down, wanted[None, :]
    steps = units * TAPS
    part = (steps + splits - 1) // splits
    sums = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    for i in range(split * part, tl.minimum(steps, (split + 1) * part)):
        own, tap = i // TAPS, i % TAPS
        source = (first_unit + own) // offset_units * TAPS + tap
        y, x, below, right = locate(
            offset + 2 * source * offset_c, offset_c, top + tap // KERNEL_W * dilation_h,
            left + tap % KERNEL_W * dilation_w, height, width, present, SUM,
        )  # fmt: skip
        y, x = tl.expand_dims(tl.where(on_edge(y, x, below, right), -2, y), AXIS), tl.expand_dims(x, AXIS)
        below, right = tl.expand_dims(below, AXIS), tl.expand_dims(right, AXIS)
        at = input + (first_unit + own) * unit * stride_c + y * stride_h + x * stride_w + along * stride_c
        weights = weight + (tap * units + own) * unit
        factor = None
        if mask is not None:
            factor = tl.expand_dims(tl.load(mask + source * mask_c, mask=present, other=0.0).to(SUM), AXIS)
        ul, ur, ll, lr = insides(y, x, height, width, pixel)
        for c in tl.range(0, unit, BLOCK_K):
            some = None if EVEN else c + along < unit
            a = sample(at + c * stride_c, stride_h, stride_w, ul, ur, ll, lr, some, below, right, factor, SUM)
            b = tl.load(weights + c, mask=wanted if EVEN else wanted & (c + down < unit), other=0.0)
            a, b = a.to(OPERAND), b.to(OPERAND)
            if not CHANNELS_LAST:
                a = tl.trans(a)
            if PRECISION == "tf32x3":
                # Not an addition: the compiler would have the matrix unit add to the sums.
                sums = tl.fma(tl.dot(a, b, input_precision="tf32x3"), 1.0, sums)
            else:
                sums = tl.dot(a, b, sums, input_precision="tf32" if PRECISION == "tf32" else "ieee", out_dtype=SUM)
    return sums


_NUMBERS = (
    *NUMBERS, "outputs", "groups", "units", "unit", "offset_units", "stride_n", "stride_c", "stride_h", "stride_w",
    *OFFSET_STRIDES, *MASK_STRIDES, "tiles_m", "tiles_n", "splits",
)  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS)
def deform_conv2d_kernel(
    input, weight, offset, mask, bias, out,
    images, height, width, out_height, out_width, step_h, step_w, pad_h, pad_w, dilation_h, dilation_w,
    outputs, groups, units, unit, offset_units, stride_n, stride_c, stride_h, stride_w,
    offset_n, offset_c, offset_h, offset_w, mask_n, mask_c, mask_h, mask_w, tiles_m, tiles_n, splits,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, OUT_CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``outputs`` and ``units`` are those of a group. ``unit``, and the strides of a channels-last input, are given
    divided by VECTOR. With SPLIT, ``out`` takes the sums of each part of the depth, [splits, pixels, outputs]."""
    if WIDE:
        stride_n, stride_c, stride_h, stride_w = in_64_bits(stride_n, stride_c, stride_h, stride_w)
        offset_n, offset_c, offset_h, offset_w = in_64_bits(offset_n, offset_c, offset_h, offset_w)
        mask_n, mask_c, mask_h, mask_w = in_64_bits(mask_n, mask_c, mask_h, mask_w)
        out_height = out_height.to(tl.int64)
    unit *= VECTOR
    if CHANNELS_LAST:
        stride_n, stride_h, stride_w, stride_c = stride_n * VECTOR, stride_h * VECTOR, stride_w * VECTOR, 1
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    split = program % splits
    group = program // splits % groups
    tile_m, tile_n = tile_of(program // splits // groups, tiles_m, tiles_n)
    m, k = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    area = out_height * out_width
    present, wanted = m < images * area, k < outputs
    image, place = m // area, m % area
    row, column = place // out_width, place % out_width
    channel = group * outputs + k
    if mask is not None:
        mask += image * mask_n + row * mask_h + column * mask_w
    sums = _sum_samples(
        input + image * stride_n, weight + channel * (TAPS * units * unit),
        offset + (image * offset_n + row * offset_h + column * offset_w), mask,
        row * step_h - pad_h, column * step_w - pad_w, present, wanted, group * units, units, unit, offset_units,
        height, width, stride_c, stride_h, stride_w, offset_c, mask_c, dilation_h, dilation_w, split, splits,
        KERNEL_W, TAPS, EVEN, CHANNELS_LAST, OPERAND, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if SPLIT:
        at = (split * images * area + m)[:, None] * (groups * outputs) + channel[None, :]
        tl.store(out + at, sums, mask=present[:, None] & wanted[None, :])
    else:
        finish(
            sums if OUT_CHANNELS_LAST else tl.trans(sums), bias, None, out, image, place, channel, present, wanted,
            area, groups * outputs, place, 0, OUT_CHANNELS_LAST, "none", 0.0,
        )  # fmt: skip


# ---- launch --------------------------------------------------------------------------------------

_PROCESSORS = 4 if INTERPRETED else 132
_LEAST_STEPS = 2  # taps of units in a part of the depth
# Pixels, outputs and channels of a tile at most, by the size of an operand. The four pixels around each point take
# registers, and where they are loaded one by one, so do their addresses.
_TILES = {2: (64, 256, 32), 4: (64, 128, 16), 8: (32, 32, 16)}
if INTERPRETED:  # whose time goes by the number of programs and steps
    _TILES = dict.fromkeys(_TILES, (512, 256, 256))


class Problem(NamedTuple):
    """All but the data: what a launch depends on."""

    shape: Shape
    dtype: torch.dtype
    """Of input and output."""
    operand: torch.dtype
    precision: str
    input: Layout
    offset: tuple[int, ...]
    mask: tuple[int, ...] | None
    bias: bool
    channels_last: bool
    """Of the output, which is dense."""
    wide: bool


@functools.lru_cache(maxsize=1024)
def plan(p: Problem) -> tuple[tuple[Launch, ...], int]:
    """Launches one after the other, and the elements of the sums between them."""
    shape, groups = p.shape, p.shape.geometry.groups
    m, n, depth = _TILES[p.operand.itemsize]
    m, n = power_of_2(shape.pixels, 16, m), power_of_2(shape.group_outputs, 16, n)
    depth = power_of_2(shape.unit, 16, depth)
    tiles = ceil_div(shape.pixels, m), ceil_div(shape.group_outputs, n)
    programs = math.prod(tiles) * groups
    splits = max(1, min(_PROCESSORS // programs, shape.group_units * shape.taps // _LEAST_STEPS))
    numbers = (
        *shape.numbers(), shape.group_outputs, groups, shape.group_units, shape.unit // p.input.vector,
        shape.offset_units, *p.input.strides, *p.offset, *(p.mask or (0,) * 4), *tiles, splits,
    )  # fmt: skip
    constants = dict(
        KERNEL_W=shape.kernel_w, TAPS=shape.taps, SPLIT=splits > 1, EVEN=shape.unit % depth == 0,
        VECTOR=p.input.vector, CHANNELS_LAST=p.input.channels_last, OUT_CHANNELS_LAST=p.channels_last, WIDE=p.wide,
        OPERAND=triton_type(p.operand), PRECISION=p.precision, BLOCK_M=m, BLOCK_N=n, BLOCK_K=depth,
    )  # fmt: skip
    bias, mask = "bias" if p.bias else None, None if p.mask is None else "mask"
    tensors = dict(input="input", weight="weight", offset="offset", mask=mask)
    tensors |= dict(bias=None, out="sums") if splits > 1 else dict(bias=bias, out="out")
    launch = Launch(
        deform_conv2d_kernel, programs * splits, tensors, dict(zip(_NUMBERS, numbers, strict=True)), constants,
        8 if m * max(n, depth) > 1024 else 4,
    )  # fmt: skip
    if splits == 1:
        return (launch,), 0
    return (launch, finish_launch(_convolution(p), splits)), splits * shape.pixels * shape.outputs


def _convolution(p: Problem) -> Convolution:
    """The problem whose parts finish_launch adds: of the output's shape."""
    images, channels, height, width, outputs, out_height, out_width, *size, g = p.shape
    return Convolution(
        p.dtype, (images, channels, height, width), p.input.strides, (images, outputs, out_height, out_width),
        p.channels_last, None, p.bias, tuple(size), g.groups, g[:2], g[2:4], g[4:6], False, "none", 0.0, False,
    )  # fmt: skip


def deform_conv2d(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Tensor:
    geometry = Geometry(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, offset_groups)
    factors = mask if use_mask else None
    shape = check_shape(input, weight, offset, factors, bias, geometry)
    memory_format = torch._prims_common.suggest_memory_format(input)
    sizes = shape.images, shape.outputs, shape.out_height, shape.out_width
    out = torch.empty(sizes, dtype=input.dtype, device=input.device, memory_format=memory_format)
    if not out.numel():
        return out
    dtype = operand(input, weight)
    problem = Problem(
        shape, input.dtype, dtype, precision(dtype), layout(input, shape.unit), strides(offset),
        strides(mask) if use_mask else None, bias.numel() > 0, memory_format == torch.channels_last,
        is_wide(shape, input, offset, factors, out),
    )  # fmt: skip
    launches, sums = plan(problem)
    tensors = dict(input=input, weight=laid_out(weight, dtype), offset=offset, mask=mask, bias=bias, out=out)
    tensors["bias"] = bias.contiguous()
    if sums:
        tensors["sums"] = torch.empty(sums, dtype=sum_type(dtype), device=input.device)
    run(launches, tensors)
    return out


# ---- compiled ahead ------------------------------------------------------------------------------


def _example(*arguments, mask: bool = True, **options) -> Problem:
    """With a bias."""
    shape, input, offset = example(*arguments, **options)
    return Problem(
        shape, input.dtype, input.dtype, precision(input.dtype), layout(input, shape.unit),
        strides(offset), strides(offset[:, ::2]) if mask else None, True, layout(input, 1).channels_last, False,
    )  # fmt: skip


_EXAMPLES = {
    "2 x 256 x 100 x 136 to 256; 32 GFLOP, 41 us": _example(torch.bfloat16, 2, 256, 100, 136, 256),
    "the same, contiguous, without mask; 41 us": _example(
        torch.float16, 2, 256, 100, 136, 256, channels_last=False, mask=False
    ),
    "1 x 512 x 25 x 34 to 512, in parts; 4 GFLOP, 5 us": _example(torch.float16, 1, 512, 25, 34, 512),
    "float32, contiguous, 2 x 256 x 100 x 136 to 256; 0.25 ms of three products each": _example(
        torch.float32, 2, 256, 100, 136, 256, channels_last=False
    ),
    "float64, 2 x 256 x 50 x 68 to 256; 8 GFLOP": _example(torch.float64, 2, 256, 50, 68, 256),
}
VARIANTS = [
    plan(problem)[0][0].variant(problem.dtype, note, matrix=problem.dtype != torch.float64)
    for note, problem in _EXAMPLES.items()
] + _BACKWARD_VARIANTS
