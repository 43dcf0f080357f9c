"""Convolutions, also transposed ones, of one input channel for each group: no products of matrices.

A program computes ``TILE_H`` x ``TILE_W`` pixels of ``BLOCK_C`` channels. For each tap it multiplies the tile, shifted,
by the tap's weights; taps load the same lines from the L1 cache, neighbouring programs their common borders from the L2
cache, so that memory is read about once. Channels-last maps are read in vectors of channels, others along rows.
Weights lie as ``[KH, KW, K]``, so that those of a tap are neighbours.

Bytes: input and output once; operations: 2 for each tap of an output. 32 images, 144 channels, 56 x 56, 3x3, float16:
58 MB are 13 us on an H200 (4.3 TB/s), 0.26 GFLOP 4 us (60 TFLOP/s). The L1 caches, at 128 bytes a clock of each of 132
processors, deliver the nine taps in another 9 us, beside the others; from 5x5 on they are what bounds it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._convolution import (
    INTERPRETED,
    RESIDUAL_STRIDES,
    Launch,
    Plan,
    Problem,
    ceil_div,
    epilogue_constants,
    first_tap,
    has_neighbours,
    in_64_bits,
    in_vectors,
    phase_steps,
    power_of_2,
)
from ._epilogue import finish

_NUMBERS = (
    *("images", "height", "width", "out_height", "out_width", "channels"),
    *("stride_n", "stride_c", "stride_h", "stride_w", *RESIDUAL_STRIDES),
    *("step_h", "step_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "every_h", "every_w", "inverse_h", "inverse_w"),
)


@triton.jit(do_not_specialize=_NUMBERS)
def depthwise_kernel(
    x, weight, bias, residual, out,
    images, height, width, out_height, out_width, channels,
    stride_n, stride_c, stride_h, stride_w, residual_n, residual_c, residual_h, residual_w,
    step_h, step_w, pad_h, pad_w, dilation_h, dilation_w, every_h, every_w, inverse_h, inverse_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    TRANSPOSED: tl.constexpr, MULTIPLIER: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, OUT_CHANNELS_LAST: tl.constexpr, RESIDUAL_CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr, OUT_VECTOR: tl.constexpr, WIDE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``channels``: of the output, MULTIPLIER for each of the input.

    As in implicit_gemm_kernel, what is a multiple of VECTOR or OUT_VECTOR is given divided by it: strides of a
    channels-last input, and ``channels`` and the strides of a channels-last residual.
    """
    if WIDE:
        stride_n, stride_c, stride_h, stride_w = in_64_bits(stride_n, stride_c, stride_h, stride_w)
        residual_n, residual_c, residual_h, residual_w = in_64_bits(residual_n, residual_c, residual_h, residual_w)
        out_height, channels, every_h, every_w = in_64_bits(out_height, channels, every_h, every_w)
    channels = channels * OUT_VECTOR
    if CHANNELS_LAST:
        stride_n, stride_h, stride_w, stride_c = stride_n * VECTOR, stride_h * VECTOR, stride_w * VECTOR, 1
    if RESIDUAL_CHANNELS_LAST:
        residual_n, residual_h, residual_w = residual_n * OUT_VECTOR, residual_h * OUT_VECTOR, residual_w * OUT_VECTOR
        residual_c = 1
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    tiles_h, tiles_w, blocks = tl.cdiv(out_height, TILE_H), tl.cdiv(out_width, TILE_W), tl.cdiv(channels, BLOCK_C)
    pixel, channel = tl.arange(0, TILE_H * TILE_W), tl.arange(0, BLOCK_C)
    row = program // tiles_w % tiles_h * TILE_H + pixel // TILE_W
    column = program % tiles_w * TILE_W + pixel % TILE_W
    channel += program // (tiles_w * tiles_h) % blocks * BLOCK_C
    image = program // (tiles_w * tiles_h * blocks)
    present, wanted = (row < out_height) & (column < out_width), channel < channels

    if TRANSPOSED:
        first_h = first_tap(row, KERNEL_H, step_h, pad_h, dilation_h, every_h, inverse_h)
        first_w = first_tap(column, KERNEL_W, step_w, pad_w, dilation_w, every_w, inverse_w)
        top, left = (row + pad_h - first_h * dilation_h) // step_h, (column + pad_w - first_w * dilation_w) // step_w
        move_h, move_w = -(dilation_h // (step_h // every_h)), -(dilation_w // (step_w // every_w))
    else:
        every_h, every_w = 1, 1
        top, left, move_h, move_w = row * step_h - pad_h, column * step_w - pad_w, dilation_h, dilation_w

    AXIS: tl.constexpr = 1 if OUT_CHANNELS_LAST else 0  # of the channels
    UNSIGNED: tl.constexpr = tl.uint64 if WIDE else tl.uint32  # in which negative rows and columns are large ones
    SUM: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    height, width = height.to(UNSIGNED), width.to(UNSIGNED)
    x += tl.expand_dims(image * stride_n + top * stride_h + left * stride_w, AXIS)
    x += tl.expand_dims(channel // MULTIPLIER * stride_c, 1 - AXIS)
    weight += tl.expand_dims(channel, 1 - AXIS)
    if TRANSPOSED:
        weight += tl.expand_dims((first_h * KERNEL_W + first_w) * channels, AXIS)
        first_h, first_w = tl.expand_dims(first_h, AXIS), tl.expand_dims(first_w, AXIS)
    there, some = tl.expand_dims(present, AXIS), tl.expand_dims(wanted, 1 - AXIS)
    top, left = tl.expand_dims(top, AXIS), tl.expand_dims(left, AXIS)
    sums = tl.zeros([TILE_H * TILE_W, BLOCK_C] if OUT_CHANNELS_LAST else [BLOCK_C, TILE_H * TILE_W], SUM)
    for tap_h in tl.range(0, TAPS_H):
        row_inside = there & ((top + tap_h * move_h).to(UNSIGNED) < height)
        for tap_w in tl.range(0, TAPS_W, loop_unroll_factor=TAPS_W if TAPS_W < 8 else 8):
            filters = some
            if TRANSPOSED:
                filters &= (first_h + tap_h * every_h < KERNEL_H) & (first_w + tap_w * every_w < KERNEL_W)
            inside = filters & row_inside & ((left + tap_w * move_w).to(UNSIGNED) < width)
            value = tl.load(x + (tap_h * move_h * stride_h + tap_w * move_w * stride_w), mask=inside, other=0.0)
            offset = (tap_h * every_h * KERNEL_W + tap_w * every_w) * channels
            factor = tl.load(weight + offset, mask=filters, other=0.0)
            sums += value.to(SUM) * factor.to(SUM)

    place, pixel = row * out_width + column, image * residual_n + row * residual_h + column * residual_w
    finish(
        sums, bias, residual, out, image, place, channel, present, wanted, out_height * out_width, channels, pixel,
        residual_c, OUT_CHANNELS_LAST, ACTIVATION, SLOPE,
    )  # fmt: skip


# ---- launch --------------------------------------------------------------------------------------

# Elements of a tile and the most pixels along its sides, of contiguous and of channels-last outputs; of contiguous ones
# they are fewer, as the address of each takes registers. The interpreter's time goes by the number of tiles.
_TILES = ((1024, 16, 64), (4096, 8, 8))
if INTERPRETED:
    _TILES = ((65536, 64, 64), (65536, 32, 32))


def depthwise(p: Problem) -> Plan:
    """The weight lies as ``[KH, KW, K]``."""
    vector, strides = in_vectors(p.dtype, p.input_strides, p.input[1])
    out_vector, residual_strides = in_vectors(p.dtype, p.residual_strides, p.out[1])
    every, inverse = phase_steps(p)
    taps = map(ceil_div, p.size, every) if p.transposed else p.size

    images, channels, *size = p.out
    elements, *sides = _TILES[p.channels_last]
    if p.dtype == torch.float64 and p.channels_last:
        elements //= 2  # for its registers
    tile_h, tile_w = (power_of_2(n, 1, most) for n, most in zip(size, sides, strict=True))
    block = power_of_2(channels, 1, min(64, elements // (tile_h * tile_w)))
    programs = images * ceil_div(channels, block) * ceil_div(size[0], tile_h) * ceil_div(size[1], tile_w)
    numbers = (
        images, *p.input[2:], *size, channels // out_vector, *strides, *residual_strides,
        *p.stride, *p.padding, *p.dilation, *every, *inverse,
    )  # fmt: skip
    constants = dict(
        KERNEL_H=p.size[0], KERNEL_W=p.size[1], **dict(zip(("TAPS_H", "TAPS_W"), taps, strict=True)),
        TRANSPOSED=p.transposed, MULTIPLIER=p.outputs, CHANNELS_LAST=has_neighbours(p.input_strides), VECTOR=vector,
        OUT_VECTOR=out_vector, TILE_H=tile_h, TILE_W=tile_w, BLOCK_C=block, **epilogue_constants(p),
    )  # fmt: skip
    bias, residual = "bias" if p.bias else None, None if p.residual_strides is None else "residual"
    tensors = dict(x="input", weight="weight", bias=bias, residual=residual, out="out")
    numbers = dict(zip(_NUMBERS, numbers, strict=True))
    return Plan((Launch(depthwise_kernel, programs, tensors, numbers, constants),), 0)
