"""What the kernels of deformable convolution share: shapes and their checks, points at which kernel elements sample.

Channels go in units: those of a unit are in one group and in one offset group. A unit has as many channels as the
common divisor of both, which commonly is the smaller of the two. A point is where a kernel element (tap) samples for a
pixel of the output: the pixel of the input to its upper left and how far below and right of that it lies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.deform_conv2d import output_size
from ._convolution import INTERPRETED, check, sum_type

_LIMIT = (2**31 - 1) // 4
_TYPES = {
    torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16
}  # fmt: skip
if INTERPRETED:  # which has no products of bfloat16
    _TYPES[torch.bfloat16] = tl.float32


class Geometry(NamedTuple):
    """Of a call, as the operators' arguments have it."""

    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    groups: int
    offset_groups: int


class Shape(NamedTuple):
    images: int
    channels: int
    height: int
    width: int
    outputs: int
    out_height: int
    out_width: int
    kernel_h: int
    kernel_w: int
    geometry: Geometry

    @property
    def taps(self) -> int:
        return self.kernel_h * self.kernel_w

    @property
    def pixels(self) -> int:
        """Of the outputs of all images."""
        return self.images * self.out_height * self.out_width

    @property
    def unit(self) -> int:
        return math.gcd(self.channels // self.geometry.groups, self.channels // self.geometry.offset_groups)

    @property
    def group_outputs(self) -> int:
        return self.outputs // self.geometry.groups

    @property
    def group_units(self) -> int:
        return self.channels // self.geometry.groups // self.unit

    @property
    def offset_units(self) -> int:
        """Of an offset group."""
        return self.channels // self.geometry.offset_groups // self.unit

    def numbers(self) -> tuple[int, ...]:
        """The arguments of kernels that NUMBERS names."""
        return (*self[:1], *self[2:4], *self[5:7], *self.geometry[:6])


NUMBERS = (
    *("images", "height", "width", "out_height", "out_width"),
    *("step_h", "step_w", "pad_h", "pad_w", "dilation_h", "dilation_w"),
)
OFFSET_STRIDES = "offset_n", "offset_c", "offset_h", "offset_w"
MASK_STRIDES = "mask_n", "mask_c", "mask_h", "mask_w"


def check_shape(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor, geometry: Geometry
) -> Shape:
    """What kernels rely on where they access memory."""
    tensors = {"input": input, "weight": weight, "offset": offset, "mask": mask, "bias": bias}
    for name, t in tensors.items():
        if t is not None:
            check_floating(name, t, input)
            same = (t.dtype == torch.float64) == (input.dtype == torch.float64) or (name == "bias" and not t.numel())
            check(same, f"input: float64 does not mix with other types, got {input.dtype} and {name} of {t.dtype}")
    check(input.dim() == 4, f"input: expected shape [N, C, H, W], got {list(input.shape)}")
    check(weight.dim() == 4, f"weight: expected shape [O, C / groups, kh, kw], got {list(weight.shape)}")
    (images, channels, *sides), (outputs, in_group, *size) = input.shape, weight.shape
    g = geometry
    check(min(g[:2]) > 0, f"stride: expected at least 1, got {g[:2]}")
    check(min(g[2:4]) >= 0, f"padding: expected at least 0, got {g[2:4]}")
    check(min(g[4:6]) > 0, f"dilation: expected at least 1, got {g[4:6]}")
    check(min(size) > 0 < channels, f"weight: expected a kernel of at least 1x1, got {list(weight.shape)}")
    check(
        g.groups > 0 and channels == g.groups * in_group and outputs % g.groups == 0,
        f"groups: expected a divisor of the channels of input ({channels}) and output ({outputs}), with weight of "
        f"shape [{outputs}, C / groups, kh, kw], got {g.groups} and {list(weight.shape)}",
    )
    check(
        g.offset_groups > 0 and channels % g.offset_groups == 0,
        f"offset_groups: expected a divisor of the {channels} channels, got {g.offset_groups}",
    )
    spans = [d * (k - 1) + 1 for d, k in zip(g[4:6], size, strict=True)]
    check(max(*spans, *g[:6]) < _LIMIT, f"stride, padding, dilation: expected a reach below {_LIMIT}, got {g[:6]}")
    check(min(sides) > 0 and max(sides) < _LIMIT, f"input: expected a size of 1 to {_LIMIT}, got {sides}")
    out = [output_size(*axis) for axis in zip(sides, size, g[:2], g[2:4], g[4:6], strict=True)]
    check(min(out) > 0, f"input: expected at least the size of the kernel after padding, {spans}, got {sides}")
    taps = math.prod(size)
    check_size("offset", offset, (images, 2 * g.offset_groups * taps, *out))
    if mask is not None:
        check_size("mask", mask, (images, g.offset_groups * taps, *out))
    check(bias.shape in ((outputs,), (0,)), f"bias: expected shape [{outputs}] or [0], got {list(bias.shape)}")
    return Shape(images, channels, *sides, outputs, *out, *size, geometry)


def check_floating(name: str, t: Tensor, input: Tensor) -> None:
    check(t.dtype in _TYPES, f"{name}: expected float32, float64, float16 or bfloat16, got {t.dtype}")
    check(t.device == input.device, f"{name}: expected a tensor on {input.device}, as input, got {t.device}")


def check_size(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    check(t.shape == shape, f"{name}: expected shape {list(shape)}, got {list(t.shape)}")


def operand(*tensors: Tensor) -> torch.dtype:
    """What products are of: the tensors' type, or that of sums where they differ."""
    first = tensors[0].dtype
    return first if all(t.dtype == first for t in tensors) else sum_type(first)


def triton_type(dtype: torch.dtype) -> tl.dtype:
    return _TYPES[dtype]


def laid_out(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``[O, kh, kw, C / groups]``."""
    return weight.permute(0, 2, 3, 1).to(dtype).contiguous()


def precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "double" if dtype == torch.float64 else "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def strides(t: Tensor | None) -> tuple[int, ...]:
    """Zero where a dimension has one element, whose stride means nothing, or there is no tensor."""
    return (0,) * 4 if t is None else tuple(s if n > 1 else 0 for s, n in zip(t.stride(), t.shape, strict=True))


class Layout(NamedTuple):
    """How kernels read a map: ``vector`` channels at a time, by strides that are divided by it if channels lie side by
    side."""

    channels_last: bool
    vector: int
    strides: tuple[int, ...]


def layout(t: Tensor, channels: int) -> Layout:
    """``channels``: of what is read as a whole."""
    s = strides(t)
    vector = math.gcd(channels, 16 // t.element_size())
    if s[1] != 1:
        return Layout(False, vector, s)
    vector = math.gcd(vector, s[0], *s[2:])
    return Layout(True, vector, (s[0] // vector, 1, *(n // vector for n in s[2:])))


def is_wide(shape: Shape, *tensors: Tensor | None) -> bool:
    """Whether offsets in the tensors, or in what has a row for each point, cell or tap, need 64 bits.

    Points reach two pixels out of the input, where they have offsets though nothing is read.
    """
    counts = [shape.pixels * max(shape.outputs, 2 * shape.geometry.offset_groups * shape.taps, 128 * shape.taps)]
    counts += [shape.images * shape.geometry.offset_groups * (shape.height + 1) * (shape.width + 1)]
    counts += [shape.outputs * shape.channels // shape.geometry.groups * shape.taps]
    for t in tensors:
        if t is not None:
            counts.append(sum((n + 3) * s for n, s in zip(t.shape, strides(t), strict=True)))
    return max(counts) >= 2**31 - 2**20


def example(
    dtype: torch.dtype, images: int, channels: int, height: int, width: int, outputs: int, *,
    groups: int = 1, offset_groups: int = 1, channels_last: bool = True,
) -> tuple[Shape, Tensor, Tensor]:  # fmt: skip
    """Shape, input and offset, without data, of a kernel of 3 x 3 and an output of the input's size."""
    geometry = Geometry(1, 1, 1, 1, 1, 1, groups, offset_groups)
    form = torch.channels_last if channels_last else torch.contiguous_format
    input = torch.empty(images, channels, height, width, dtype=dtype, device="meta", memory_format=form)
    offset = torch.empty(images, 18 * offset_groups, height, width, dtype=dtype, device="meta")
    return Shape(images, channels, height, width, outputs, height, width, 3, 3, geometry), input, offset


# ---- device functions ----------------------------------------------------------------------------


@triton.jit
def _split(position, size):
    """The integer below, from -2 to ``size``, and what remains; -2 for NaN."""
    p = tl.where(position >= -2, position, -2.0)
    p = tl.where(p < size, p, size.to(p.dtype))
    low = tl.floor(p)
    return low.to(tl.int32), p - low


@triton.jit
def locate(offset, offset_c, y, x, height, width, present, REAL: tl.constexpr):
    """Points: row and column of the upper left pixel, how far below and right of it they are.

    ``offset`` points to the offsets in y, ``y`` and ``x`` are positions without them. A NaN is NaN below and right of a
    pixel that is outside.
    """
    y = y.to(REAL) + tl.load(offset, mask=present, other=0.0).to(REAL)
    x = x.to(REAL) + tl.load(offset + offset_c, mask=present, other=0.0).to(REAL)
    nan = (y != y) | (x != x)
    y, below = _split(y, height)
    x, right = _split(x, width)
    return tl.where(nan, -2, y), x, tl.where(nan, float("nan"), below), tl.where(nan, float("nan"), right)


@triton.jit
def on_edge(y, x, below, right):
    """Exactly one pixel before the first: nothing is there, but for derivatives."""
    return ((y == -1) & (below == 0)) | ((x == -1) & (right == 0))


@triton.jit
def insides(y, x, height, width, present):
    """Which of the four pixels around points are in the input: upper left, upper right, lower left, lower right."""
    upper, lower = present & (y >= 0) & (y < height), present & (y >= -1) & (y < height - 1)
    left, right = (x >= 0) & (x < width), (x >= -1) & (x < width - 1)
    return upper & left, upper & right, lower & left, lower & right


@triton.jit
def load_corners(at, stride_h, stride_w, upper_left, upper_right, lower_left, lower_right, some, REAL: tl.constexpr):
    """The four pixels around points, zero where they are not inside; only ``some`` channels, if that is not None."""
    if some is not None:
        upper_left, upper_right = upper_left & some, upper_right & some
        lower_left, lower_right = lower_left & some, lower_right & some
    a = tl.load(at, mask=upper_left, other=0.0).to(REAL)
    b = tl.load(at + stride_w, mask=upper_right, other=0.0).to(REAL)
    c = tl.load(at + stride_h, mask=lower_left, other=0.0).to(REAL)
    d = tl.load(at + stride_h + stride_w, mask=lower_right, other=0.0).to(REAL)
    return a, b, c, d


@triton.jit
def sample(
    at, stride_h, stride_w, upper_left, upper_right, lower_left, lower_right, some, below, right, factor,
    REAL: tl.constexpr,
):  # fmt: skip
    """Interpolated, and modulated unless ``factor`` is None; other channels than ``some`` are zero."""
    a, b, c, d = load_corners(at, stride_h, stride_w, upper_left, upper_right, lower_left, lower_right, some, REAL)
    above, left = 1 - below, 1 - right
    value = a * (above * left) + b * (above * right) + c * (below * left) + d * (below * right)
    if factor is not None:
        value *= factor
    return value if some is None else tl.where(some, value, 0.0)
