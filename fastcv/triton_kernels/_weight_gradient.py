"""What the kernels of weights' gradients share: what is to be computed, how pixels are numbered, the sum of the parts.

    gradient[k, c, tap] = sum over pixels of grad[pixel, k] * input[place of pixel + tap, c]

The sums are long and few, 10^5 pixels for the weights of a layer, so that their pixels are split among programs. Each
writes its part in float32, and finish_weights_kernel adds the parts: no two programs add to one element, and results
are the same at every run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._convolution import INTERPRETED, Launch, ceil_div


class WeightProblem(NamedTuple):
    """All but the data: what a plan depends on."""

    dtype: torch.dtype
    input: tuple[int, ...]
    """The shape."""
    input_strides: tuple[int, ...]
    grad: tuple[int, ...]
    grad_strides: tuple[int, ...]
    size: tuple[int, ...]
    groups: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    channels_last: bool
    """Of the result, which is dense."""
    tf32: bool
    """Whether float32 operands may be rounded to 11 bits."""

    @property
    def channels(self) -> int:
        """Of a group."""
        return self.input[1] // self.groups

    @property
    def outputs(self) -> int:
        """Of a group."""
        return self.grad[1] // self.groups

    @property
    def taps(self) -> int:
        return math.prod(self.size)

    @property
    def pixels(self) -> int:
        return self.grad[0] * self.grad[2] * self.grad[3]

    @property
    def elements(self) -> int:
        """Of the result."""
        return self.grad[1] * self.channels * self.taps


# ---- pixels --------------------------------------------------------------------------------------

_PIXEL_BITS = 30


def division(divisor: int) -> tuple[int, int]:
    """A factor and a shift by which kernels divide numbers of pixels, with two instructions in the place of twenty:
    ``n // divisor = (n * factor >> 30) >> shift`` for n below 2^30 (Granlund and Montgomery, PLDI 1994)."""
    shift = (divisor - 1).bit_length()
    return ceil_div(1 << (_PIXEL_BITS + shift), divisor), shift


@triton.jit
def divide(n, divisor, factor, shift):
    if n.dtype == tl.int64:
        return n // divisor
    else:
        return (tl.umulhi((n * 4).to(tl.uint32), factor.to(tl.uint32)) >> shift.to(tl.uint32)).to(tl.int32)


def is_wide(p: WeightProblem, parts: int) -> bool:
    """Whether offsets, or rows and columns with their padding, need 64 bits."""
    axes = zip(p.grad[2:], p.input[2:], p.stride, p.padding, p.dilation, p.size, strict=True)
    reach = [max(n, (o + 1) * s) + 2 * pad + d * k for o, n, s, pad, d, k in axes]  # taps outside have offsets as well
    numbers = [*reach, p.elements * parts, 2 * p.pixels]
    for shape, strides in (((*p.input[:2], *reach), p.input_strides), (p.grad, p.grad_strides)):
        numbers.append(sum((n + 1) * s for n, s in zip(shape, strides, strict=True)))
    return max(numbers) >= 2**31 - 2**21


# ---- the sum of the parts ------------------------------------------------------------------------

_NUMBERS = "parts", "elements", "taps", "channels"


@triton.jit(do_not_specialize=_NUMBERS)
def finish_weights_kernel(
    sums, out, parts, elements, taps, channels,
    TURNED: tl.constexpr, WIDE: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds ``sums``, [parts, elements], AT_ONCE parts at a time. TURNED: elements are [..., taps, channels] and stored
    as [..., channels, taps]."""
    if WIDE:
        elements, taps, channels = elements.to(tl.int64), taps.to(tl.int64), channels.to(tl.int64)
    element = tl.program_id(0).to(elements.dtype) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, AT_ONCE)[:, None]
    total = tl.zeros([AT_ONCE, BLOCK], sums.dtype.element_ty)
    for i in tl.range(0, parts, AT_ONCE):
        mask = (i + part < parts) & (element < elements)[None, :]
        total += tl.load(sums + ((i + part) * elements + element[None, :]), mask=mask, other=0.0)
    place = element
    if TURNED:
        row, c = element // (taps * channels), element % channels
        place = (row * channels + c) * taps + element // channels % taps
    tl.store(out + place, tl.sum(total, 0).to(out.dtype.element_ty), mask=element < elements)


_BLOCK = 1024 if INTERPRETED else 128
_AT_ONCE = 32


def finish_weights_launch(p: WeightProblem, parts: int, channels: int) -> Launch:
    """``channels``: of the sums, which end in [taps, channels]."""
    numbers = dict(zip(_NUMBERS, (parts, p.elements, p.taps, channels), strict=True))
    turned = p.taps > 1 < channels and not (p.channels_last and channels == p.channels)
    constants = dict(TURNED=turned, WIDE=is_wide(p, parts), AT_ONCE=min(_AT_ONCE, triton.next_power_of_2(parts)))
    programs = ceil_div(p.elements, _BLOCK)
    return Launch(finish_weights_kernel, programs, dict(sums="sums", out="out"), numbers, constants | {"BLOCK": _BLOCK})
