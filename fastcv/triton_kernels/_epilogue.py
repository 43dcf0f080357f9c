"""What happens to a tile of sums on its way to memory: bias, residual and activation, as device functions."""

from __future__ import annotations

import triton
import triton.language as tl

from ._convolution import (
    INTERPRETED,
    RESIDUAL_STRIDES,
    Launch,
    Problem,
    ceil_div,
    epilogue_constants,
    in_64_bits,
    in_vectors,
    power_of_2,
)


@triton.jit
def clamp(x, low, high):
    """NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def tanh(x):
    """Near zero, where the difference would cancel, the first terms of the series."""
    limit: tl.constexpr = 0.02 if x.dtype == tl.float64 else 0.25
    t = tl.exp(-2 * tl.abs(x))
    large = (1 - t) / (1 + t)
    u = x * x
    series = x * (1 + u * (-1 / 3 + u * (2 / 15 + u * (-17 / 315 + u * (62 / 2835)))))
    return tl.where(tl.abs(x) < limit, series, tl.where(x < 0, -large, large))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)  # in this order NaN stays NaN
    elif ACTIVATION == "relu6":
        return clamp(x, 0.0, 6.0)
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0, x, x * SLOPE)
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "hardswish":
        return x * (clamp(x + 3, 0.0, 6.0) / 6)
    elif ACTIVATION == "hardsigmoid":
        return clamp(x + 3, 0.0, 6.0) / 6
    elif ACTIVATION == "sigmoid":
        return tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "tanh":
        return tanh(x)
    else:
        tl.static_assert(ACTIVATION == "none")
        return x


@triton.jit
def finish(
    sums, bias, residual, out, image, place, channel, present, wanted, area, channels, residual_pixel, residual_c,
    CHANNELS_LAST: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """Stores ``activation(sums + bias + residual)``, for sums of [pixels, channels] or, where ``out`` is not
    CHANNELS_LAST, [channels, pixels].

    ``bias`` and ``residual`` may be None. ``out`` is dense; its pixels are ``place`` of ``area`` in ``image``, those of
    the residual at ``residual_pixel``, with channels ``residual_c`` apart. Pixels that are not ``present`` and channels
    that are not ``wanted`` are left out.
    """
    AXIS: tl.constexpr = 1 if CHANNELS_LAST else 0  # of the channels
    if bias is not None:
        sums += tl.expand_dims(tl.load(bias + channel, mask=wanted, other=0.0).to(sums.dtype), 1 - AXIS)
    if CHANNELS_LAST:
        offset = ((image * area + place) * channels)[:, None] + channel[None, :]
    else:
        offset = (image * channels * area + place)[None, :] + (channel * area)[:, None]
    mask = tl.expand_dims(present, AXIS) & tl.expand_dims(wanted, 1 - AXIS)
    if residual is not None:
        at = tl.expand_dims(residual_pixel, AXIS) + tl.expand_dims(channel * residual_c, 1 - AXIS)
        sums += tl.load(residual + at, mask=mask, other=0.0).to(sums.dtype)
    tl.store(out + offset, activate(sums, ACTIVATION, SLOPE).to(out.dtype.element_ty), mask=mask)


_NUMBERS = "splits", "pixels", "width", "area", "channels", *RESIDUAL_STRIDES


@triton.jit(do_not_specialize=_NUMBERS)
def finish_kernel(
    sums, bias, residual, out, splits, pixels, width, area, channels, residual_n, residual_c, residual_h, residual_w,
    VECTOR: tl.constexpr, OUT_CHANNELS_LAST: tl.constexpr, RESIDUAL_CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same for sums in ``splits`` parts, [splits, pixels, channels]; VECTOR divides ``channels`` and the strides of
    a channels-last residual, which are given divided by it."""
    channels = channels * VECTOR
    if WIDE:
        residual_n, residual_c, residual_h, residual_w = in_64_bits(residual_n, residual_c, residual_h, residual_w)
    if RESIDUAL_CHANNELS_LAST:
        residual_n, residual_h, residual_w = residual_n * VECTOR, residual_h * VECTOR, residual_w * VECTOR
        residual_c = 1
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_N)
    m = program // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    present, wanted = m < pixels, channel < channels
    at, mask = m[:, None] * channels + channel[None, :], present[:, None] & wanted[None, :]
    total = tl.load(sums + at, mask=mask, other=0.0)
    for i in tl.range(1, splits, loop_unroll_factor=4):
        total += tl.load(sums + i * pixels * channels + at, mask=mask, other=0.0)
    image, place = m // area, m % area
    pixel = image * residual_n + place // width * residual_h + place % width * residual_w
    finish(
        total if OUT_CHANNELS_LAST else tl.trans(total), bias, residual, out, image, place, channel, present, wanted,
        area, channels, pixel, residual_c, OUT_CHANNELS_LAST, ACTIVATION, SLOPE,
    )  # fmt: skip


_PIXELS = 128 if INTERPRETED else 16  # of a tile; few, as there are few outputs where sums are in parts


def finish_launch(p: Problem, splits: int) -> Launch:
    images, channels, height, width = p.out
    pixels, block = images * height * width, power_of_2(channels, 16, 64)
    vector, residual_strides = in_vectors(p.dtype, p.residual_strides, channels)
    numbers = (splits, pixels, width, height * width, channels // vector, *residual_strides)
    constants = dict(VECTOR=vector, BLOCK_M=_PIXELS, BLOCK_N=block, **epilogue_constants(p))
    bias, residual = "bias" if p.bias else None, None if p.residual_strides is None else "residual"
    tensors = dict(sums="sums", bias=bias, residual=residual, out="out")
    programs = ceil_div(pixels, _PIXELS) * ceil_div(channels, block)
    return Launch(finish_kernel, programs, tensors, dict(zip(_NUMBERS, numbers, strict=True)), constants, num_warps=2)
