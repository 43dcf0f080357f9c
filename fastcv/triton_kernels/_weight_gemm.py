"""Gradients of weights as matrix products whose right operand is gathered from the input, never written out.

Rows are the outputs of a group, columns kernel elements (taps) times the group's channels, the depth is all pixels:

    gradient[k, tap, c] = sum over pixels of grad[pixel, k] * input[place of pixel + tap, c]

A program computes a tile of ``BLOCK_M`` outputs by ``BLOCK_N`` columns, of one tap or, where groups have few or uneven
channels (``FLAT``), of any. At each step it takes ``BLOCK_K`` pixels, of whatever rows and images. Channels-last maps
are read in vectors of channels and turned over by the matrix unit; others are read where they lie, along rows, element
by element. Programs that share pixels run at the same time, so that memory is read about once.

There are few tiles, 36 of 128 x 128 for 3x3 and 256 to 256 channels, so that pixels are split: into as many parts as
make the rounds of programs over the processors, and the parts' way through memory, take least time.

float32: in three products, as _implicit_gemm.py has it.

Bytes: input and grad once, sums written and read once for each part; operations: 2 * pixels * K * taps * channels. 3x3,
256 to 256 channels, 8 images of 50 x 68, bfloat16: 28 MB are 6.5 us, 32 GFLOP 41 us on an H200 (4.3 TB/s, 790
TFLOP/s); seven parts of the sums are 33 MB more, which the L2 cache holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._convolution import INTERPRETED, Launch, Plan, ceil_div, has_neighbours, in_64_bits, in_vectors, power_of_2
from ._implicit_gemm import DEPTHS, DEPTHS_ONE_BY_ONE, LEAST_STEPS, PROCESSORS, TILES, Tile, precision, tile_of
from ._weight_gradient import WeightProblem, divide, division, finish_weights_launch, is_wide

_NUMBERS = (
    *("images", "height", "width", "out_height", "out_width", "groups", "channels", "outputs"),
    *("stride_n", "stride_c", "stride_h", "stride_w", "grad_n", "grad_c", "grad_h", "grad_w"),
    *("step_h", "step_w", "pad_h", "pad_w", "dilation_h", "dilation_w"),
    *("factor_h", "shift_h", "factor_w", "shift_w", "tiles_m", "tiles_n", "steps", "part"),
)


@triton.jit(do_not_specialize=_NUMBERS)  # what matters of them, VECTOR says; layers share what is compiled
def weight_gemm_kernel(
    x, grad, out,
    images, height, width, out_height, out_width, groups, channels, outputs,
    stride_n, stride_c, stride_h, stride_w, grad_n, grad_c, grad_h, grad_w,
    step_h, step_w, pad_h, pad_w, dilation_h, dilation_w, factor_h, shift_h, factor_w, shift_w,
    tiles_m, tiles_n, steps, part,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, SPLIT: tl.constexpr, OUT_CHANNELS_LAST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, GRAD_CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, GRAD_VECTOR: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``channels`` and ``outputs`` are those of a group; ``factor`` and ``shift``: see division, of ``out_height`` and
    ``out_width``. ``steps`` of BLOCK_K pixels are done in parts of ``part``.

    What is a multiple of VECTOR or GRAD_VECTOR is given divided by it: ``channels`` and the strides of a channels-last
    input, ``outputs`` and the strides of a channels-last ``grad``. ``out`` is [K, taps, channels] or, not
    OUT_CHANNELS_LAST, [K, channels, taps]; with SPLIT it takes the sums of each part, [parts, K, taps, channels].
    """
    if WIDE:
        stride_n, stride_c, stride_h, stride_w = in_64_bits(stride_n, stride_c, stride_h, stride_w)
        grad_n, grad_c, grad_h, grad_w = in_64_bits(grad_n, grad_c, grad_h, grad_w)
        step_h, step_w, channels, part = in_64_bits(step_h, step_w, channels, part)
    channels, outputs = channels * VECTOR, outputs * GRAD_VECTOR
    if CHANNELS_LAST:
        stride_n, stride_h, stride_w, stride_c = stride_n * VECTOR, stride_h * VECTOR, stride_w * VECTOR, 1
    if GRAD_CHANNELS_LAST:
        grad_n, grad_h, grad_w, grad_c = grad_n * GRAD_VECTOR, grad_h * GRAD_VECTOR, grad_w * GRAD_VECTOR, 1

    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    split = program // (groups * tiles_m * tiles_n)
    program = program % (groups * tiles_m * tiles_n)
    group = program % groups
    tile_m, tile_n = tile_of(program // groups, tiles_m, tiles_n)
    k = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if FLAT:
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        tap, c = n // channels, n % channels
        some = tap < KERNEL_H * KERNEL_W
    else:
        blocks = tl.cdiv(channels, BLOCK_N)
        tap, c = tile_n // blocks, tile_n % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        some = c < channels
    move_h, move_w = tap // KERNEL_W * dilation_h - pad_h, tap % KERNEL_W * dilation_w - pad_w

    # Along which axis the tiles have their channels.
    AXIS: tl.constexpr = 1 if CHANNELS_LAST else 0
    GRAD_AXIS: tl.constexpr = 1 if GRAD_CHANNELS_LAST else 0
    # In which negative rows and columns are large ones.
    UNSIGNED: tl.constexpr = tl.uint64 if WIDE else tl.uint32
    SUM: tl.constexpr = tl.float64 if PRECISION == "double" else tl.float32
    x += tl.expand_dims((group * channels + c) * stride_c + move_h * stride_h + move_w * stride_w, 1 - AXIS)
    grad += tl.expand_dims((group * outputs + k) * grad_c, 1 - GRAD_AXIS)
    wanted = tl.expand_dims(k < outputs, 1 - GRAD_AXIS)
    height, width = height.to(UNSIGNED), width.to(UNSIGNED)
    if FLAT:
        move_h, move_w = tl.expand_dims(move_h, 1 - AXIS), tl.expand_dims(move_w, 1 - AXIS)
    some = tl.expand_dims(some, 1 - AXIS)
    sums = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    for i in tl.range(split * part, tl.minimum(steps, (split + 1) * part)):
        pixel = i * BLOCK_K + tl.arange(0, BLOCK_K)
        line = divide(pixel, out_width, factor_w, shift_w)
        image = divide(line, out_height, factor_h, shift_h)
        row, column = line - image * out_height, pixel - line * out_width
        present = image < images
        offset = image * grad_n + row * grad_h + column * grad_w
        inside = tl.expand_dims(present, GRAD_AXIS) & wanted
        a = tl.load(grad + tl.expand_dims(offset, GRAD_AXIS), mask=inside, other=0.0)

        row, column = row * step_h, column * step_w
        offset = image * stride_n + row * stride_h + column * stride_w
        row, column = tl.expand_dims(row, AXIS) + move_h, tl.expand_dims(column, AXIS) + move_w
        inside = (row.to(UNSIGNED) < height) & (column.to(UNSIGNED) < width) & tl.expand_dims(present, AXIS) & some
        b = tl.load(x + tl.expand_dims(offset, AXIS), mask=inside, other=0.0)

        if GRAD_CHANNELS_LAST:
            a = tl.trans(a)
        if not CHANNELS_LAST:
            b = tl.trans(b)
        if INTERPRETED and a.dtype == tl.bfloat16:  # for which it has no arithmetic
            a, b = a.to(tl.float32), b.to(tl.float32)
        if PRECISION == "tf32x3":
            # Not an addition: the compiler would have the matrix unit add to the sums.
            sums = tl.fma(tl.dot(a, b, input_precision="tf32x3"), 1.0, sums)
        else:
            sums = tl.dot(a, b, sums, input_precision="tf32" if PRECISION == "tf32" else "ieee", out_dtype=SUM)

    if not CHANNELS_LAST:
        some = tl.trans(some)
    mask = (k < outputs)[:, None] & some
    k += group * outputs
    if SPLIT or OUT_CHANNELS_LAST:
        at = (k + split * groups * outputs)[:, None] * (KERNEL_H * KERNEL_W * channels)
        at += (tap * channels + c)[None, :]
    else:
        at = (k * channels)[:, None] * (KERNEL_H * KERNEL_W) + (c * (KERNEL_H * KERNEL_W) + tap)[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=mask)


# ---- launch --------------------------------------------------------------------------------------

# What writing and reading a part of a sum takes, by the size of an element, in multiply-adds of a processor.
_PART = {2: 6, 4: 1, 8: 1}
_MOST_ONE_BY_ONE = 1 << 30 if INTERPRETED else 8192  # elements of a tile, for registers


def _tile(p: WeightProblem, flat: bool, one_by_one: bool) -> tuple[Tile, int]:
    """The tile and the steps of a part that take least time."""
    itemsize = p.dtype.itemsize
    depth = power_of_2(p.pixels, 16, (DEPTHS_ONE_BY_ONE if one_by_one else DEPTHS)[itemsize])
    steps, best = ceil_div(p.pixels, depth), None
    for (m, n), rate in TILES[itemsize].items():
        m, n = power_of_2(p.outputs, 16, m), power_of_2(p.channels * (p.taps if flat else 1), 16, n)
        if one_by_one and m * n > _MOST_ONE_BY_ONE:
            continue
        programs = p.groups * ceil_div(p.outputs, m) * _columns(p, flat, n)
        for rounds in range(1, 5):
            parts = max(1, min(rounds * PROCESSORS // programs, steps // LEAST_STEPS))
            part = ceil_div(steps, parts)
            parts = ceil_div(steps, part)
            cost = ceil_div(programs * parts, PROCESSORS) * part * depth * (m * n / rate + 2048)
            cost += 0 if parts == 1 else _PART[itemsize] * parts * p.elements
            if best is None or cost < best[0]:
                large = m * n > (2048 if one_by_one else 4096)
                best = cost, Tile(m, n, depth, 8 if large else 4, 4 if itemsize == 4 else 3), part
    assert best is not None
    return best[1:]


def _columns(p: WeightProblem, flat: bool, block: int) -> int:
    """Of tiles."""
    return ceil_div(p.channels * p.taps, block) if flat else p.taps * ceil_div(p.channels, block)


def _is_flat(p: WeightProblem) -> bool:
    """Where tiles for each tap would be padded by more than a fifth."""
    return p.taps > 1 and 5 * (-p.channels % power_of_2(p.channels, 16, 64)) > p.channels


def weight_gemm(p: WeightProblem) -> Plan:
    vector, strides = in_vectors(p.dtype, p.input_strides, p.channels)
    grad_vector, grad_strides = in_vectors(p.dtype, p.grad_strides, p.outputs)
    last, grad_last = has_neighbours(p.input_strides), has_neighbours(p.grad_strides)
    flat = _is_flat(p)
    one_by_one = min(vector if last else 1, grad_vector if grad_last else 1) * p.dtype.itemsize < 8
    tile, part = _tile(p, flat, one_by_one)
    tiles = ceil_div(p.outputs, tile.rows), _columns(p, flat, tile.columns)
    steps = ceil_div(p.pixels, tile.depth)
    parts = ceil_div(steps, part)
    numbers = (
        p.input[0], *p.input[2:], *p.grad[2:], p.groups, p.channels // vector, p.outputs // grad_vector, *strides,
        *grad_strides, *p.stride, *p.padding, *p.dilation, *division(p.grad[2]), *division(p.grad[3]), *tiles, steps,
        part,
    )  # fmt: skip
    constants = dict(
        KERNEL_H=p.size[0], KERNEL_W=p.size[1], SPLIT=parts > 1, OUT_CHANNELS_LAST=p.channels_last,
        CHANNELS_LAST=last, GRAD_CHANNELS_LAST=grad_last, VECTOR=vector, GRAD_VECTOR=grad_vector, FLAT=flat,
        WIDE=is_wide(p, parts), PRECISION=precision(p.dtype, p.tf32),
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth,
    )  # fmt: skip
    tensors = dict(x="input", grad="grad", out="sums" if parts > 1 else "out")
    launch = Launch(
        weight_gemm_kernel, p.groups * tiles[0] * tiles[1] * parts, tensors, dict(zip(_NUMBERS, numbers, strict=True)),
        constants, tile.num_warps, tile.num_stages,
    )  # fmt: skip
    if parts == 1:
        return Plan((launch,), 0)
    return Plan((launch, finish_weights_launch(p, parts, p.channels)), parts * p.elements)
