"""The gradient of deformable convolution's weight: the output's gradient times the samples, summed over pixels.

A program computes ``BLOCK_O`` outputs by ``BLOCK_C`` channels, a piece (_deform_backward.py) of one tap, and goes
through pixels ``BLOCK_P`` at a time: finds their points, samples the input as the forward pass does (deform_conv2d.py)
and multiplies on the matrix unit. Where tiles are too few for the processors, pixels are divided among programs, whose
sums are added in order. Nothing is sampled in advance, so that no columns are stored; each sample is made once for
every ``BLOCK_O`` outputs.

Operations and bytes: as the forward pass, with the gradient instead of the output, and the parts of sums, as many
floats as weights each. 2 images of 256 channels, 100 x 136 pixels, to 256 channels with 3 x 3 in bfloat16: 32 GFLOP, 41
us on an H200 at 790 TFLOP/s; 29 MB, 7 us. Reasoned, not measured.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._convolution import in_64_bits
from ._deform import MASK_STRIDES, NUMBERS, OFFSET_STRIDES, insides, locate, on_edge, sample

WEIGHT_NUMBERS = (
    *NUMBERS, "outputs", "groups", "group_units", "unit", "offset_units",
    "stride_n", "stride_c", "stride_h", "stride_w", "grad_n", "grad_c", "grad_h", "grad_w",
    *OFFSET_STRIDES, *MASK_STRIDES, "tiles", "splits",
)  # fmt: skip


@triton.jit(do_not_specialize=WEIGHT_NUMBERS)
def deform_conv2d_weight_kernel(
    grad, input, offset, mask, sums,
    images, height, width, out_height, out_width, step_h, step_w, pad_h, pad_w, dilation_h, dilation_w,
    outputs, groups, group_units, unit, offset_units, stride_n, stride_c, stride_h, stride_w,
    grad_n, grad_c, grad_h, grad_w, offset_n, offset_c, offset_h, offset_w, mask_n, mask_c, mask_h, mask_w,
    tiles, splits,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr, VECTOR: tl.constexpr,
    GRAD_VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr, GRAD_CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What is given divided by VECTOR or GRAD_VECTOR: see deform_conv2d_columns_kernel; ``outputs`` and ``tiles`` are
    those of a group. ``sums``: [splits, outputs of all groups, taps, channels of a group]."""
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
    tap, tile, split = program % TAPS, program // TAPS % tiles, program // TAPS // tiles % splits
    piece = program // TAPS // tiles // splits
    own, first = piece // PIECES, piece % PIECES * BLOCK_C
    group, source = own // group_units, own // offset_units * TAPS + tap
    o, c = tile * BLOCK_O + tl.arange(0, BLOCK_O), first + tl.arange(0, BLOCK_C)
    along, wanted = tl.expand_dims(c, 1 - AXIS), tl.expand_dims(o < outputs, 1 - GRAD_AXIS)
    some = None if EVEN else along < unit
    input += (own * unit + along) * stride_c
    grad += tl.expand_dims((group * outputs + o) * grad_c, 1 - GRAD_AXIS)
    area = out_height * out_width
    steps = tl.cdiv(images * area, BLOCK_P)
    part = tl.cdiv(steps, splits)
    total = tl.zeros([BLOCK_O, BLOCK_C], SUM)
    for i in tl.range(split * part, tl.minimum(steps, (split + 1) * part)):
        m = i * BLOCK_P + tl.arange(0, BLOCK_P)
        present, image, row, column = m < images * area, m // area, m // out_width % out_height, m % out_width
        at = grad + tl.expand_dims(image * grad_n + row * grad_h + column * grad_w, GRAD_AXIS)
        a = tl.load(at, mask=tl.expand_dims(present, GRAD_AXIS) & wanted, other=0.0).to(OPERAND)
        y, x, below, right = locate(
            offset + image * offset_n + 2 * source * offset_c + row * offset_h + column * offset_w, offset_c,
            row * step_h - pad_h + tap // KERNEL_W * dilation_h, column * step_w - pad_w + tap % KERNEL_W * dilation_w,
            height, width, present, SUM,
        )  # fmt: skip
        factor = None
        if mask is not None:
            at = mask + image * mask_n + source * mask_c + row * mask_h + column * mask_w
            factor = tl.expand_dims(tl.load(at, mask=present, other=0.0).to(SUM), AXIS)
        at = input + tl.expand_dims(image * stride_n + y * stride_h + x * stride_w, AXIS)
        y, x = tl.expand_dims(tl.where(on_edge(y, x, below, right), -2, y), AXIS), tl.expand_dims(x, AXIS)
        ul, ur, ll, lr = insides(y, x, height, width, tl.expand_dims(present, AXIS))
        below, right = tl.expand_dims(below, AXIS), tl.expand_dims(right, AXIS)
        b = sample(at, stride_h, stride_w, ul, ur, ll, lr, some, below, right, factor, SUM).to(OPERAND)
        if GRAD_CHANNELS_LAST:
            a = tl.trans(a)
        if not CHANNELS_LAST:
            b = tl.trans(b)
        if PRECISION == "tf32x3":
            # Not an addition: the compiler would have the matrix unit add to the sums.
            total = tl.fma(tl.dot(a, b, input_precision="tf32x3"), 1.0, total)
        else:
            total = tl.dot(a, b, total, input_precision="tf32" if PRECISION == "tf32" else "ieee", out_dtype=SUM)
    to = ((split * groups + group) * outputs + o)[:, None] * TAPS + tap
    to = (to * group_units + own % group_units) * unit + c[None, :]
    tl.store(sums + to, total, mask=(o < outputs)[:, None] & (c < unit)[None, :])
