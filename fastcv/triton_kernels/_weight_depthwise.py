"""Gradients of the weights of convolutions of one input channel for each group: no products of matrices.

A program takes ``BLOCK_C`` channels and ``TAPS`` taps over a part of the pixels. At each step it reads ``BLOCK_P``
pixels of the gradient once and of the input once for each tap, from the L1 cache after the first, and adds their
products to a sum for each tap, pixel of the step and channel; pixels' sums are added at the end. Channels-last maps are
read in vectors of channels, others along rows. A second kernel adds the parts.

Bytes: input and grad once (for each ``TAPS`` taps), of the parts little; operations: 2 for each tap of an output. 32
images, 144 channels, 56 x 56, 3x3, float16: 58 MB are 13 us on an H200 (4.3 TB/s), 0.26 GFLOP 4 us (60 TFLOP/s). The L1
caches, at 128 bytes a clock of each of 132 processors, deliver the nine taps in another 9 us.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._convolution import INTERPRETED, Launch, Plan, ceil_div, has_neighbours, in_64_bits, in_vectors, power_of_2
from ._implicit_gemm import PROCESSORS
from ._weight_gradient import WeightProblem, divide, division, finish_weights_launch, is_wide

_NUMBERS = (
    *("images", "height", "width", "out_height", "out_width", "channels"),
    *("stride_n", "stride_c", "stride_h", "stride_w", "grad_n", "grad_c", "grad_h", "grad_w"),
    *("step_h", "step_w", "pad_h", "pad_w", "dilation_h", "dilation_w"),
    *("factor_h", "shift_h", "factor_w", "shift_w", "steps", "part"),
)


@triton.jit(do_not_specialize=_NUMBERS)
def weight_depthwise_kernel(
    x, grad, out,
    images, height, width, out_height, out_width, channels,
    stride_n, stride_c, stride_h, stride_w, grad_n, grad_c, grad_h, grad_w,
    step_h, step_w, pad_h, pad_w, dilation_h, dilation_w, factor_h, shift_h, factor_w, shift_w, steps, part,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, MULTIPLIER: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    GRAD_CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, GRAD_VECTOR: tl.constexpr, WIDE: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``channels``: of ``grad``, MULTIPLIER for each of the input. ``out``: the sums, [parts, taps, channels].

    As in weight_gemm_kernel, what is a multiple of VECTOR or GRAD_VECTOR is given divided by it: strides of a
    channels-last input, and ``channels`` and the strides of a channels-last ``grad``.
    """
    if WIDE:
        stride_n, stride_c, stride_h, stride_w = in_64_bits(stride_n, stride_c, stride_h, stride_w)
        grad_n, grad_c, grad_h, grad_w = in_64_bits(grad_n, grad_c, grad_h, grad_w)
        step_h, step_w, channels, part = in_64_bits(step_h, step_w, channels, part)
    channels = channels * GRAD_VECTOR
    if CHANNELS_LAST:
        stride_n, stride_h, stride_w, stride_c = stride_n * VECTOR, stride_h * VECTOR, stride_w * VECTOR, 1
    if GRAD_CHANNELS_LAST:
        grad_n, grad_h, grad_w, grad_c = grad_n * GRAD_VECTOR, grad_h * GRAD_VECTOR, grad_w * GRAD_VECTOR, 1

    ALL_TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    TAP_BLOCKS: tl.constexpr = (ALL_TAPS + TAPS - 1) // TAPS
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    split = program // (TAP_BLOCKS * blocks)
    tap = program % TAP_BLOCKS * TAPS + tl.arange(0, TAPS)
    channel = program // TAP_BLOCKS % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    wanted, some = channel < channels, tap < ALL_TAPS
    move_h, move_w = tap // KERNEL_W * dilation_h - pad_h, tap % KERNEL_W * dilation_w - pad_w

    # Tiles are [taps, pixels, channels] or, of inputs that are not CHANNELS_LAST, [taps, channels, pixels].
    AXIS: tl.constexpr = 1 if CHANNELS_LAST else 0  # of the channels, but for the taps
    UNSIGNED: tl.constexpr = tl.uint64 if WIDE else tl.uint32  # in which negative rows and columns are large ones
    SUM: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    grad += tl.expand_dims(channel * grad_c, 1 - AXIS)[None, :, :]
    x += (move_h * stride_h + move_w * stride_w)[:, None, None]
    x += tl.expand_dims(channel // MULTIPLIER * stride_c, 1 - AXIS)[None, :, :]
    height, width = height.to(UNSIGNED), width.to(UNSIGNED)
    move_h, move_w, some = move_h[:, None, None], move_w[:, None, None], some[:, None, None]
    here = tl.expand_dims(wanted, 1 - AXIS)[None, :, :]
    sums = tl.zeros([TAPS, BLOCK_P, BLOCK_C] if CHANNELS_LAST else [TAPS, BLOCK_C, BLOCK_P], SUM)
    for i in tl.range(split * part, tl.minimum(steps, (split + 1) * part)):
        pixel = tl.expand_dims(i * BLOCK_P + tl.arange(0, BLOCK_P), AXIS)[None, :, :]
        line = divide(pixel, out_width, factor_w, shift_w)
        image = divide(line, out_height, factor_h, shift_h)
        row, column = line - image * out_height, pixel - line * out_width
        present = (image < images) & here
        g = tl.load(grad + (image * grad_n + row * grad_h + column * grad_w), mask=present, other=0.0)
        row, column = row * step_h, column * step_w
        offset = image * stride_n + row * stride_h + column * stride_w
        inside = ((row + move_h).to(UNSIGNED) < height) & ((column + move_w).to(UNSIGNED) < width) & some & present
        value = tl.load(x + offset, mask=inside, other=0.0)
        sums += value.to(SUM) * g.to(SUM)
    total = tl.sum(sums, 1 if CHANNELS_LAST else 2)
    at = (split * ALL_TAPS + tap)[:, None] * channels + channel[None, :]
    tl.store(out + at, total, mask=(tap < ALL_TAPS)[:, None] & wanted[None, :])


# ---- launch --------------------------------------------------------------------------------------

# Sums of a program, which are in registers, of contiguous and of channels-last inputs: of contiguous ones they
# are fewer, as the address of each pixel takes registers. The interpreter's time goes by the number of steps.
_SUMS = (1 << 16, 1 << 16) if INTERPRETED else (1 << 12, 1 << 13)
_TAPS = 16
_ROUNDS = 4  # of programs over the processors, of which each has several at a time
_LEAST_STEPS = 16  # of a part


def weight_depthwise(p: WeightProblem) -> Plan:
    vector, strides = in_vectors(p.dtype, p.input_strides, p.input[1])
    outputs = p.grad[1]
    grad_vector, grad_strides = in_vectors(p.dtype, p.grad_strides, outputs)
    last = has_neighbours(p.input_strides)
    taps, sums = power_of_2(p.taps, 1, _TAPS), _SUMS[last] // (2 if p.dtype == torch.float64 else 1)
    channels = power_of_2(outputs, 1, 64 if last or INTERPRETED else 2)
    pixels = power_of_2(p.pixels, 1, sums // (taps * channels))

    programs, steps = ceil_div(outputs, channels) * ceil_div(p.taps, taps), ceil_div(p.pixels, pixels)
    parts = max(1, min(_ROUNDS * PROCESSORS // programs, steps // _LEAST_STEPS))
    part = ceil_div(steps, parts)
    parts = ceil_div(steps, part)
    numbers = (
        p.input[0], *p.input[2:], *p.grad[2:], outputs // grad_vector, *strides, *grad_strides, *p.stride, *p.padding,
        *p.dilation, *division(p.grad[2]), *division(p.grad[3]), steps, part,
    )  # fmt: skip
    constants = dict(
        KERNEL_H=p.size[0], KERNEL_W=p.size[1], MULTIPLIER=p.outputs, CHANNELS_LAST=last,
        GRAD_CHANNELS_LAST=has_neighbours(p.grad_strides), VECTOR=vector, GRAD_VECTOR=grad_vector,
        WIDE=is_wide(p, parts), TAPS=taps, BLOCK_P=pixels, BLOCK_C=channels,
    )  # fmt: skip
    tensors, numbers = dict(x="input", grad="grad", out="sums"), dict(zip(_NUMBERS, numbers, strict=True))
    launch = Launch(weight_depthwise_kernel, programs * parts, tensors, numbers, constants, 8 if last else 4)
    return Plan((launch, finish_weights_launch(p, parts, outputs)), parts * p.elements)
