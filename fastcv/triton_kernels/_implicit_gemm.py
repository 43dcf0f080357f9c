"""Convolutions as matrix products whose left operand is gathered from the input, never written out.

Rows are output pixels, columns the outputs of a group, the depth is kernel elements (taps) times the group's channels:

    out[pixel, k] = sum over tap, c of input[place of pixel + tap, c] * weight[k, tap, c]

A program computes a tile of ``BLOCK_M`` pixels by ``BLOCK_N`` outputs. At each step it takes ``BLOCK_K`` channels of a
tap or, where groups have few or uneven channels (``FLAT``), ``BLOCK_K`` pairs of tap and channel, of which the last
block alone is padded: the 7 x 7 taps of an image's 3 channels fill 147 of 160, where a block for each tap would be 80 %
zeros. Loads run ahead of the products by the compiler's pipeline. Programs that share pixels or weights run one after
the other, in groups of eight rows of tiles, so that both come from the L2 cache: memory is read about once. Where tiles
are too few for the processors, the depth is split, and a second kernel adds the parts in order.

Weights lie as ``[K, KH, KW, C / groups]``, so that both operands of channels-last inputs are read in vectors along the
depth. Inputs of other strides are read where they lie, along rows, and turned over on their way to the matrix unit.

A transposed convolution is one for each phase of the output (position modulo stride): of the taps, every
``stride / gcd(stride, dilation)``-th counts. All phases are one launch, side by side, as they write to the same lines.

float32: operands are split in two parts of 11 bits ("tf32x3": three products), which leaves errors of 2^-21 in each
product. The matrix unit's adder truncates, so that long sums would drift; each block is summed there from zero, and
added to the others outside, rounded to nearest. That is as exact as float32 sums are (but infinite operands may give
NaN) and on an H200 faster at best, 130 TFLOP/s, than outside of the matrix unit, 60.

Bytes: input, weight, residual and output once; operations: 2 * pixels * K * depth. 3x3, 256 to 256 channels, 50 x 68
pixels, bfloat16: 4.7 MB are 1.1 us, 4.0 GFLOP 5.1 us on an H200 (4.3 TB/s, 790 TFLOP/s), on whose 132 processors it has
108 tiles.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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
from ._epilogue import finish, finish_launch

_GROUP = tl.constexpr(8)


@triton.jit
def tile_of(program, tiles_m, tiles_n):
    """Rows of tiles in groups of ``_GROUP``, within which the columns are outside."""
    first = program // (_GROUP * tiles_n) * _GROUP
    rows = tl.minimum(tiles_m - first, _GROUP)
    program = program % (_GROUP * tiles_n)
    return first + program % rows, program // rows


@triton.jit
def _sum_over_taps(
    x, weight, top, left, present, wanted, height, width, channels, stride_h, stride_w, stride_c,
    taps_h, taps_w, move_h, move_w, step_h, step_w, split, splits,
    FLAT: tl.constexpr, EVEN: tl.constexpr, TRANSPOSED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of sums over the ``split``-th part of the depth, [BLOCK_M, BLOCK_N].

    ``x`` points to each pixel's first tap, in row ``top`` and column ``left`` of the input, from which the others are
    ``move_h`` and ``move_w`` away; ``weight`` to the first tap of each filter, whose others are ``step_h`` and
    ``step_w`` further.
    """
    # Along which axis the input's tile has its channels.
    AXIS: tl.constexpr = 1 if CHANNELS_LAST else 0
    # In which negative rows and columns are large ones.
    UNSIGNED: tl.constexpr = tl.uint64 if top.dtype == tl.int64 else tl.uint32
    height, width = height.to(UNSIGNED), width.to(UNSIGNED)
    x, present = tl.expand_dims(x, AXIS), tl.expand_dims(present, AXIS)
    top, left = tl.expand_dims(top, AXIS), tl.expand_dims(left, AXIS)
    along, down = tl.expand_dims(tl.arange(0, BLOCK_K), 1 - AXIS), tl.arange(0, BLOCK_K)[:, None]
    weight, wanted = weight[None, :] + down, wanted[None, :]
    taps = taps_h * taps_w
    blocks = (channels + BLOCK_K - 1) // BLOCK_K
    steps = (taps * channels + BLOCK_K - 1) // BLOCK_K if FLAT else taps * blocks
    part = (steps + splits - 1) // splits
    SUM: tl.constexpr = tl.float64 if PRECISION == "double" else tl.float32
    sums = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    # No functions are called in the loop, where the interpreter would spend most of its time entering them.
    for i in tl.range(split * part, tl.minimum(steps, (split + 1) * part)):
        if FLAT:
            tap = (i * BLOCK_K + along) // channels
            c = i * BLOCK_K + along - tap * channels
        else:
            tap = i // blocks
            c = (i - tap * blocks) * BLOCK_K
        tap_h = tap // taps_w
        tap_w = tap - tap_h * taps_w
        move_y, move_x = tap_h * move_h, tap_w * move_w
        row, column = top + move_y, left + move_x
        inside = present & (row.to(UNSIGNED) < height) & (column.to(UNSIGNED) < width)
        offset = move_y * stride_h + move_x * stride_w + c * stride_c
        if FLAT:
            inside &= tap < taps
        else:
            offset += along * stride_c
            if not EVEN:
                inside &= c + along < channels
        a = tl.load(x + offset, mask=inside, other=0.0)

        if FLAT and TRANSPOSED:
            depth = i * BLOCK_K + down
            tap = depth // channels
            inside = wanted & (tap < taps)
            offset = tap // taps_w * step_h + tap % taps_w * step_w + depth % channels - down
        elif FLAT:
            inside = wanted & (i * BLOCK_K + down < taps * channels)
            offset = i * BLOCK_K
        else:
            inside = wanted if EVEN else wanted & (c + down < channels)
            offset = tap_h * step_h + tap_w * step_w + c
        b = tl.load(weight + offset, mask=inside, other=0.0)

        if not CHANNELS_LAST:
            a = tl.trans(a)
        if INTERPRETED and a.dtype == tl.bfloat16:  # for which it has no arithmetic
            a, b = a.to(tl.float32), b.to(tl.float32)
        if PRECISION == "tf32x3":
            # Not an addition: the compiler would have the matrix unit add to the sums.
            sums = tl.fma(tl.dot(a, b, input_precision="tf32x3"), 1.0, sums)
        else:
            sums = tl.dot(a, b, sums, input_precision="tf32" if PRECISION == "tf32" else "ieee", out_dtype=SUM)
    return sums


_NUMBERS = (
    *("images", "height", "width", "out_height", "out_width", "groups", "channels", "outputs"),
    *("stride_n", "stride_c", "stride_h", "stride_w", *RESIDUAL_STRIDES),
    *("step_h", "step_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "every_h", "every_w", "inverse_h", "inverse_w"),
    *("tiles_m", "tiles_n", "splits"),
)


@triton.jit(do_not_specialize=_NUMBERS)  # what matters of them, VECTOR says; layers share what is compiled
def implicit_gemm_kernel(
    x, weight, bias, residual, out,
    images, height, width, out_height, out_width, groups, channels, outputs,
    stride_n, stride_c, stride_h, stride_w, residual_n, residual_c, residual_h, residual_w,
    step_h, step_w, pad_h, pad_w, dilation_h, dilation_w, every_h, every_w, inverse_h, inverse_w,
    tiles_m, tiles_n, splits,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, TRANSPOSED: tl.constexpr, SPLIT: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, OUT_CHANNELS_LAST: tl.constexpr, RESIDUAL_CHANNELS_LAST: tl.constexpr,
    FLAT: tl.constexpr, EVEN: tl.constexpr, VECTOR: tl.constexpr, OUT_VECTOR: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``channels`` and ``outputs`` are those of a group.

    What is a multiple of VECTOR or OUT_VECTOR is given divided by it: ``channels`` and the strides of a channels-last
    input, and ``outputs`` and the strides of a channels-last residual. ``every`` and ``inverse``: see first_tap.
    With SPLIT, ``out`` takes the sums of each part of the depth, [splits, pixels, outputs].
    """
    if WIDE:
        stride_n, stride_c, stride_h, stride_w = in_64_bits(stride_n, stride_c, stride_h, stride_w)
        residual_n, residual_c, residual_h, residual_w = in_64_bits(residual_n, residual_c, residual_h, residual_w)
        out_height, channels, every_h, every_w = in_64_bits(out_height, channels, every_h, every_w)
    channels, outputs = FLAT if FLAT else channels * VECTOR, outputs * OUT_VECTOR
    if CHANNELS_LAST:
        stride_n, stride_h, stride_w, stride_c = stride_n * VECTOR, stride_h * VECTOR, stride_w * VECTOR, 1
    if RESIDUAL_CHANNELS_LAST:
        residual_n, residual_h, residual_w = residual_n * OUT_VECTOR, residual_h * OUT_VECTOR, residual_w * OUT_VECTOR
        residual_c = 1

    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    split = program % splits
    program = program // splits
    if TRANSPOSED:
        phases_h, phases_w = tl.minimum(step_h, out_height), tl.minimum(step_w, out_width)
        phase_h, phase_w = program // phases_w % phases_h, program % phases_w
        program = program // (phases_h * phases_w)
        rows, columns = tl.cdiv(out_height - phase_h, step_h), tl.cdiv(out_width - phase_w, step_w)
        first_h = first_tap(phase_h, KERNEL_H, step_h, pad_h, dilation_h, every_h, inverse_h)
        first_w = first_tap(phase_w, KERNEL_W, step_w, pad_w, dilation_w, every_w, inverse_w)
        taps_h, taps_w = tl.cdiv(KERNEL_H - first_h, every_h), tl.cdiv(KERNEL_W - first_w, every_w)
    else:
        rows, columns = out_height, out_width
    group = program % groups
    tile_m, tile_n = tile_of(program // groups, tiles_m, tiles_n)
    m, k = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    present, wanted = m < images * rows * columns, k < outputs
    image, row, column = m // (rows * columns), m // columns % rows, m % columns

    if TRANSPOSED:
        row, column = phase_h + row * step_h, phase_w + column * step_w
        top, left = (row + pad_h - first_h * dilation_h) // step_h, (column + pad_w - first_w * dilation_w) // step_w
        move_h, move_w = -(dilation_h // (step_h // every_h)), -(dilation_w // (step_w // every_w))
    else:
        first_h, first_w, taps_h, taps_w, every_h, every_w = 0, 0, KERNEL_H, KERNEL_W, 1, 1
        top, left, move_h, move_w = row * step_h - pad_h, column * step_w - pad_w, dilation_h, dilation_w
    first = group * outputs * (KERNEL_H * KERNEL_W) + first_h * KERNEL_W + first_w
    sums = _sum_over_taps(
        x + (group * channels * stride_c + image * stride_n + top * stride_h + left * stride_w),
        weight + (first + k * (KERNEL_H * KERNEL_W)) * channels,
        top, left, present, wanted, height, width, channels, stride_h, stride_w, stride_c, taps_h, taps_w,
        move_h, move_w, every_h * KERNEL_W * channels, every_w * channels, split, splits,
        FLAT, EVEN, TRANSPOSED, CHANNELS_LAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    channel, place = group * outputs + k, row * out_width + column
    all_outputs, area = groups * outputs, out_height * out_width
    if SPLIT:
        pixel = (split * images + image) * area + place
        tl.store(out + pixel[:, None] * all_outputs + channel[None, :], sums, mask=present[:, None] & wanted[None, :])
    else:
        finish(
            sums if OUT_CHANNELS_LAST else tl.trans(sums), bias, residual, out, image, place, channel, present, wanted,
            area, all_outputs, image * residual_n + row * residual_h + column * residual_w, residual_c,
            OUT_CHANNELS_LAST, ACTIVATION, SLOPE,
        )  # fmt: skip


# ---- launch --------------------------------------------------------------------------------------


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# An H100 and H200 have 132, others about as many. The interpreter's time goes by the number of programs and steps.
PROCESSORS = 4 if INTERPRETED else 132
# The largest block of the depth by the size of an element. The parts of float32 operands take registers; where elements
# are loaded one by one, so do their addresses.
DEPTHS = {2: 64, 4: 16, 8: 16}
DEPTHS_ONE_BY_ONE = {2: 32, 4: 16, 8: 16}
if INTERPRETED:
    DEPTHS = DEPTHS_ONE_BY_ONE = {2: 256, 4: 128, 8: 64}
# Tiles of pixels and outputs by the size of an element, with the part of the matrix unit's rate that they reach: larger
# ones load less for each product.
TILES = {
    2: {(128, 128): 0.95, (64, 128): 0.85, (128, 64): 0.85, (64, 64): 0.7, (128, 32): 0.55, (64, 32): 0.45},
    4: {(128, 64): 0.95, (64, 64): 0.85, (128, 32): 0.7, (64, 32): 0.6},
    8: {(64, 32): 0.95, (32, 32): 0.7},
}
if INTERPRETED:
    TILES = {size: {(4 * m, n): rate for (m, n), rate in tiles.items()} for size, tiles in TILES.items()}
LEAST_STEPS = 8  # of a part of the depth


def _tile(pixels: int, outputs: int, copies: int, depth: int, itemsize: int, one_by_one: bool) -> Tile:
    """The tile that takes least time: rounds of programs over the processors, each as long as its tile is large, or at
    least as a small one.

    ``copies``: groups and phases; ``depth``: of one load, channels or (flat) of all taps; ``one_by_one``: how elements
    are loaded, which takes registers for the address of each.
    """

    def cost(item) -> float:
        (m, n), rate = item
        m, n = power_of_2(pixels, 16, m), power_of_2(outputs, 16, n)
        rounds = ceil_div(ceil_div(pixels, m) * ceil_div(outputs, n) * copies, PROCESSORS)
        return rounds * (m * n / rate + 2048)

    m, n = min(TILES[itemsize].items(), key=cost)[0]
    m, n = power_of_2(pixels, 16, m), power_of_2(outputs, 16, n)
    depth = power_of_2(depth, 16, (DEPTHS_ONE_BY_ONE if one_by_one else DEPTHS)[itemsize])
    large = m * n > (2048 if one_by_one else 8192 if itemsize == 2 else 4096)
    return Tile(m, n, depth, 8 if large else 4, 4 if itemsize == 4 else 3)


def _is_flat(channels: int, taps: int, itemsize: int) -> bool:
    """Where blocks for each tap would be padded by more than a fifth."""
    return taps > 1 and 5 * (-channels % power_of_2(channels, 16, DEPTHS[itemsize])) > channels


def precision(dtype: torch.dtype, tf32: bool) -> str:
    if dtype != torch.float32:
        return "double" if dtype == torch.float64 else "half"
    return "tf32" if tf32 else "tf32x3"


def implicit_gemm(p: Problem) -> Plan:
    """The weight lies as ``[K, KH, KW, C / groups]``."""
    channels, outputs, itemsize, taps = p.channels, p.outputs, p.dtype.itemsize, math.prod(p.size)
    vector, strides = in_vectors(p.dtype, p.input_strides, channels)
    out_vector, residual_strides = in_vectors(p.dtype, p.residual_strides, outputs)

    phases, rows = 1, p.out[2:]
    if p.transposed:
        phases, rows = math.prod(map(min, p.stride, rows)), map(ceil_div, rows, p.stride)
    pixels, flat = p.input[0] * math.prod(rows), _is_flat(channels, taps, itemsize)
    one_by_one = not has_neighbours(p.input_strides) or vector * itemsize < (16 if flat else 8)
    one_by_one |= flat and p.transposed  # the weights
    tile = _tile(pixels, outputs, p.groups * phases, channels * taps if flat else channels, itemsize, one_by_one)
    tiles = ceil_div(pixels, tile.rows), ceil_div(outputs, tile.columns)
    programs = phases * p.groups * math.prod(tiles)
    steps = ceil_div(channels * taps, tile.depth) if flat else ceil_div(channels, tile.depth) * taps
    splits = max(1, min(PROCESSORS // programs, steps // phases // LEAST_STEPS))

    every, inverse = phase_steps(p)
    numbers = (
        p.input[0], *p.input[2:], *p.out[2:], p.groups, channels // vector, outputs // out_vector, *strides,
        *residual_strides, *p.stride, *p.padding, *p.dilation, *every, *inverse, *tiles, splits,
    )  # fmt: skip
    constants = dict(
        KERNEL_H=p.size[0], KERNEL_W=p.size[1], TRANSPOSED=p.transposed, SPLIT=splits > 1,
        CHANNELS_LAST=has_neighbours(p.input_strides), FLAT=channels if flat else 0, EVEN=channels % tile.depth == 0,
        VECTOR=vector, OUT_VECTOR=out_vector, PRECISION=precision(p.dtype, p.tf32),
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, **epilogue_constants(p),
    )  # fmt: skip
    bias, residual = "bias" if p.bias else None, None if p.residual_strides is None else "residual"
    tensors = dict(x="input", weight="weight", bias=bias, residual=residual, out="sums" if splits > 1 else "out")
    launch = Launch(
        implicit_gemm_kernel, programs * splits, tensors, dict(zip(_NUMBERS, numbers, strict=True)), constants,
        tile.num_warps, tile.num_stages,
    )  # fmt: skip
    return Plan((launch,), 0) if splits == 1 else Plan((launch, finish_launch(p, splits)), splits * math.prod(p.out))
