"""The gradient of the samples of deformable convolution: transposed weights times the gradient of the output.

A program makes the columns of one tap, tiles of ``BLOCK_M`` pixels by ``BLOCK_C`` channels, with outputs as the depth,
on the matrix unit. Multiplied by samples and by their slopes as soon as a tile is made, they give the gradients of mask
and offset, sums over the channels of an offset group that stay in the program. They are stored only where the gradient
of the input is wanted. Operations, bytes and floor: _deform_backward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._convolution import in_64_bits
from ._deform import MASK_STRIDES, NUMBERS, OFFSET_STRIDES, insides, load_corners, locate, on_edge


@triton.jit
def _column(
    grad, weight, pixel, step_c, outputs, filter, some, AXIS: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over outputs, [BLOCK_M, BLOCK_C], of ``grad``, which points to the first output of each pixel, and
    ``weight``, which points to the channels of the first of filters that are ``filter`` apart."""
    SUM: tl.constexpr = tl.float64 if PRECISION == "double" else tl.float32
    along, down = tl.expand_dims(tl.arange(0, BLOCK_K), 1 - AXIS), tl.arange(0, BLOCK_K)[:, None]
    sums = tl.zeros([BLOCK_M, BLOCK_C], SUM)
    for k in tl.range(0, outputs, BLOCK_K):
        a = tl.load(grad + (k + along) * step_c, mask=pixel & (k + along < outputs), other=0.0).to(OPERAND)
        inside = k + down < outputs
        if some is not None:
            inside &= some
        b = tl.load(weight + (k + down) * filter, mask=inside, other=0.0).to(OPERAND)
        if AXIS == 0:
            a = tl.trans(a)
        if PRECISION == "tf32x3":
            # Not an addition: the compiler would have the matrix unit add to the sums.
            sums = tl.fma(tl.dot(a, b, input_precision="tf32x3"), 1.0, sums)
        else:
            sums = tl.dot(a, b, sums, input_precision="tf32" if PRECISION == "tf32" else "ieee", out_dtype=SUM)
    return sums if some is None else tl.where(some, sums, 0.0)  # not NaN, as infinite gradients would make it


@triton.jit
def _finite_where(edge, x):
    """On the edge a pixel has weight 0, but a derivative to its side: infinity must not be weighed."""
    return tl.where(edge & ~(tl.abs(x) < float("inf")), 0.0, x)


@triton.jit
def _slopes(
    at, stride_h, stride_w, upper_left, upper_right, lower_left, lower_right, some, edge, below, right,
    REAL: tl.constexpr,
):  # fmt: skip
    """Samples, and their derivatives with respect to y and x; where a sample is on a pixel, those to the right."""
    a, b, c, d = load_corners(at, stride_h, stride_w, upper_left, upper_right, lower_left, lower_right, some, REAL)
    a, b, c, d = _finite_where(edge, a), _finite_where(edge, b), _finite_where(edge, c), _finite_where(edge, d)
    above, left = 1 - below, 1 - right
    samples = a * (above * left) + b * (above * right) + c * (below * left) + d * (below * right)
    return samples, (c - a) * left + (d - b) * right, (b - a) * above + (d - c) * below


COLUMNS_NUMBERS = (
    *NUMBERS, "outputs", "group_units", "unit", "offset_units", "stride_n", "stride_c", "stride_h", "stride_w",
    "grad_n", "grad_c", "grad_h", "grad_w", *OFFSET_STRIDES, *MASK_STRIDES,
    "first_image", "first_piece", "end_piece", "sources",
)  # fmt: skip


@triton.jit(do_not_specialize=COLUMNS_NUMBERS)
def deform_conv2d_columns_kernel(
    grad, weight, input, offset, mask, columns, grad_offset, grad_mask,
    images, height, width, out_height, out_width, step_h, step_w, pad_h, pad_w, dilation_h, dilation_w,
    outputs, group_units, unit, offset_units, stride_n, stride_c, stride_h, stride_w, grad_n, grad_c, grad_h, grad_w,
    offset_n, offset_c, offset_h, offset_w, mask_n, mask_c, mask_h, mask_w,
    first_image, first_piece, end_piece, sources,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr, VECTOR: tl.constexpr,
    GRAD_VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr, GRAD_CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tap of an offset group for BLOCK_M pixels of the slab: of ``images`` from the first on, and PIECES of each
    unit. ``unit`` and the strides of a channels-last input are given divided by VECTOR, ``outputs`` of a group and the
    strides of a channels-last gradient by GRAD_VECTOR. ``columns``: [pieces, images, taps, pixels, BLOCK_C]."""
    if WIDE:
        stride_n, stride_c, stride_h, stride_w = in_64_bits(stride_n, stride_c, stride_h, stride_w)
        grad_n, grad_c, grad_h, grad_w = in_64_bits(grad_n, grad_c, grad_h, grad_w)
        offset_n, offset_c, offset_h, offset_w = in_64_bits(offset_n, offset_c, offset_h, offset_w)
        mask_n, mask_c, mask_h, mask_w = in_64_bits(mask_n, mask_c, mask_h, mask_w)
        out_height = out_height.to(tl.int64)
    unit, outputs = unit * VECTOR, outputs * GRAD_VECTOR
    if CHANNELS_LAST:
        stride_n, stride_h, stride_w, stride_c = stride_n * VECTOR, stride_h * VECTOR, stride_w * VECTOR, 1
    if GRAD_CHANNELS_LAST:
        grad_n, grad_h, grad_w, grad_c = grad_n * GRAD_VECTOR, grad_h * GRAD_VECTOR, grad_w * GRAD_VECTOR, 1
    SUM: tl.constexpr = tl.float64 if PRECISION == "double" else tl.float32
    AXIS: tl.constexpr = 1 if CHANNELS_LAST else 0  # of the channels in the input's tile
    GRAD_AXIS: tl.constexpr = 1 if GRAD_CHANNELS_LAST else 0
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    of_group = offset_units * PIECES
    groups = (end_piece - 1) // of_group + 1 - first_piece // of_group
    tap, group, tile = program % TAPS, first_piece // of_group + program // TAPS % groups, program // TAPS // groups
    source, area = group * TAPS + tap, out_height * out_width
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    present = m < images * area
    image, place = first_image + m // area, m % area
    row, column = place // out_width, place % out_width
    y, x, below, right = locate(
        offset + image * offset_n + 2 * source * offset_c + row * offset_h + column * offset_w, offset_c,
        row * step_h - pad_h + tap // KERNEL_W * dilation_h, column * step_w - pad_w + tap % KERNEL_W * dilation_w,
        height, width, present, SUM,
    )  # fmt: skip
    factor = tl.full([BLOCK_M], 1.0, SUM)
    if mask is not None:
        at = mask + image * mask_n + source * mask_c + row * mask_h + column * mask_w
        factor = tl.load(at, mask=present, other=0.0).to(SUM)
    edge, pixel = tl.expand_dims(on_edge(y, x, below, right), AXIS), tl.expand_dims(present, AXIS)
    at = input + tl.expand_dims(image * stride_n + y * stride_h + x * stride_w, AXIS)
    y, x = tl.expand_dims(y, AXIS), tl.expand_dims(x, AXIS)
    below, right = tl.expand_dims(below, AXIS), tl.expand_dims(right, AXIS)
    ul, ur, ll, lr = insides(y, x, height, width, pixel)
    grad += tl.expand_dims(image * grad_n + row * grad_h + column * grad_w, GRAD_AXIS)
    sum_y, sum_x, sum_mask = tl.zeros([BLOCK_M], SUM), tl.zeros([BLOCK_M], SUM), tl.zeros([BLOCK_M], SUM)
    for piece in range(tl.maximum(first_piece, group * of_group), tl.minimum(end_piece, (group + 1) * of_group)):
        own, c = piece // PIECES, piece % PIECES * BLOCK_C + tl.arange(0, BLOCK_C)
        some = None if EVEN else (c < unit)[None, :]
        first_output, filter = own // group_units * outputs, TAPS * group_units * unit
        value = _column(
            grad + first_output * grad_c,
            weight + (first_output * filter + (tap * group_units + own % group_units) * unit + c)[None, :],
            tl.expand_dims(present, GRAD_AXIS), grad_c, outputs, filter, some, GRAD_AXIS, OPERAND, PRECISION,
            BLOCK_M, BLOCK_K, BLOCK_C,
        )  # fmt: skip
        if columns is not None:
            to = (piece - first_piece) * images + m // area
            to = ((to * TAPS + tap) * area + place)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
            tl.store(columns + to, value * factor[:, None], mask=present[:, None])
        if grad_offset is not None or grad_mask is not None:
            if not CHANNELS_LAST:
                value = tl.trans(value)
            along = tl.expand_dims(c, 1 - AXIS)
            samples, slopes_y, slopes_x = _slopes(
                at + (own * unit + along) * stride_c, stride_h, stride_w, ul, ur, ll, lr,
                None if EVEN else along < unit, edge, below, right, SUM,
            )  # fmt: skip
            sum_mask += tl.sum(value * samples, AXIS)
            value *= tl.expand_dims(factor, AXIS)
            if not EVEN:
                value = tl.where(along < unit, value, 0.0)  # not NaN, as infinite factors would make it
            sum_y += tl.sum(value * slopes_y, AXIS)
            sum_x += tl.sum(value * slopes_x, AXIS)
    # Other slabs may have had channels of the offset group before.
    to = (image * sources + source) * area + place
    if grad_mask is not None:
        tl.store(grad_mask + to, tl.load(grad_mask + to, mask=present, other=0.0) + sum_mask, mask=present)
    if grad_offset is not None:
        to += (image * sources + source) * area
        tl.store(grad_offset + to, tl.load(grad_offset + to, mask=present, other=0.0) + sum_y, mask=present)
        to += area
        tl.store(grad_offset + to, tl.load(grad_offset + to, mask=present, other=0.0) + sum_x, mask=present)
