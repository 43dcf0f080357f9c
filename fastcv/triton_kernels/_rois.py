"""What the kernels of the RoI operators share: how a region divides a map.

An axis of a region is four numbers: where its first bin starts and the size of a bin, in pixels of the map, the
samples per bin, 0 in a region that gives nothing, and the inverse of their number. ``POOLING`` is ``"align"``, bilinear
samples, ``"max"`` or ``"mean"`` of whole pixels, or ``"precise"``, integrals; but for the first, the number of samples
only says whether there is anything.
Coordinates are float32, or float64 where the boxes or the features are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_box(boxes, k, stride_k, stride, mask, images, DTYPE: tl.constexpr):
    """Image, -1 where the batch index is none, and the corners x1, y1, x2, y2."""
    box = boxes + k.to(tl.int64) * stride_k
    index = tl.load(box, mask=mask, other=-1).to(DTYPE)
    image = tl.where((index >= 0) & (index < images), index, -1).to(tl.int32)
    x1 = tl.load(box + stride, mask=mask, other=0).to(DTYPE)
    y1 = tl.load(box + 2 * stride, mask=mask, other=0).to(DTYPE)
    x2 = tl.load(box + 3 * stride, mask=mask, other=0).to(DTYPE)
    y2 = tl.load(box + 4 * stride, mask=mask, other=0).to(DTYPE)
    return image, x1, y1, x2, y2


@triton.jit
def on_level(mask, x1, y1, x2, y2, FROM_AREA: tl.constexpr, TO_AREA: tl.constexpr):
    """Whether a region's area is within bounds, either of which may be None; NaN is below all."""
    area = (x2 - x1) * (y2 - y1)
    if FROM_AREA is not None:
        mask = mask & (area >= FROM_AREA)
    if TO_AREA is not None:
        mask = mask & ~(area >= TO_AREA)
    return mask


@triton.jit
def make_axis(
    low, high, SCALE: tl.constexpr, BINS: tl.constexpr, POOLING: tl.constexpr, RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    low, high = low * SCALE, high * SCALE
    if POOLING == "align":
        offset = 0.5 if ALIGNED else 0.0
        start = low - offset
        extent = high - offset - start
        if not ALIGNED:
            extent = tl.where(extent < 1, 1, extent)
        finite = tl.maximum(tl.abs(start), tl.abs(extent), tl.PropagateNan.ALL) <= 1e30
    elif POOLING == "precise":
        start, extent = low, high - low
        finite = (tl.abs(start) <= 1e9) & (extent <= 1e9)
    else:
        start, last = _round(low), _round(high)
        extent = tl.maximum(last - start + (1 if POOLING == "max" else 0), 1)
        finite = tl.maximum(tl.abs(start), tl.abs(last), tl.PropagateNan.ALL) <= 1e9
    bin = divide(extent, BINS)
    if POOLING == "precise":
        grid = tl.where(finite & (bin > 0), 1, 0)
    elif POOLING != "align":
        grid = tl.where(finite, 1, 0)
    elif RATIO > 0:
        grid = tl.where(finite, RATIO, 0)
    else:
        grid = tl.where(finite, tl.minimum(tl.maximum(tl.ceil(bin), 0), 1e9), 0).to(tl.int32)
    return start, bin, grid, 1 / tl.maximum(grid, 1).to(start.dtype)


@triton.jit
def _round(x):
    """Half away from zero, as C rounds. Nothing is added to x: a compiler would fuse that with the scaling."""
    whole = tl.floor(tl.abs(x))
    whole += tl.where(tl.abs(x) - whole >= 0.5, 1, 0)
    return tl.where(x < 0, -whole, whole)


@triton.jit
def divide(a, b: tl.constexpr):
    """Exact where the quotient is a number, which ``/`` is not in float32: a bin of two pixels has two samples.

    A step of Newton's method, without the call that a division rounded to nearest makes.
    """
    quotient = a / b
    if a.dtype == tl.float32:
        divisor = tl.full(a.shape, b, tl.float32)
        quotient = tl.fma(tl.fma(-quotient, divisor, a), 1 / divisor, quotient)
    return quotient


# ---- bilinear samples ----------------------------------------------------------------------------


@triton.jit
def position(origin, bin, grid, inverse, i):
    """Where sample i of a bin from ``origin`` on is: the quotient by ``grid`` is as in divide()."""
    product = (i.to(origin.dtype) + 0.5) * bin
    quotient = product * inverse
    quotient = tl.fma(tl.fma(-quotient, grid, product), inverse, quotient)
    return origin + quotient


@triton.jit
def sample(origin, bin, grid, inverse, i, size):
    """Where sample i of a bin reads a map that is not empty, 0 to ``size - 1``, and whether it counts."""
    at = position(origin, bin, grid.to(origin.dtype), inverse, i)
    inside = (at >= -1) & (at <= size) & (i < grid)
    return tl.minimum(tl.maximum(at, 0), size - 1), inside


@triton.jit
def _samples_before(edge, origin, bin, grid, inverse):
    """How many samples of a bin lie before ``edge``, where ``bin > 0``, by bisection."""
    few = tl.zeros_like(origin).to(tl.int32)
    many = few + grid
    for _ in range(31):
        middle = few + (many - few) // 2
        before = (few < many) & (position(origin, bin, grid.to(origin.dtype), inverse, middle) < edge)
        few = tl.where(before, middle + 1, few)
        many = tl.where(before, many, middle)
    return few


@triton.jit
def samples_between(low, high, origin, bin, grid, inverse):
    """First sample of each bin that may lie from ``low`` to ``high``, and the most of them in a bin.

    All, unless they are far more than that takes: samples are about a pixel apart where sampling is adaptive.
    """
    first, count = tl.zeros_like(origin).to(tl.int32), grid
    if (bin > 0) & (grid > 4 * (high - low + 2)):
        first = _samples_before(low, origin, bin, grid, inverse)
        some = _samples_before(high + 1, origin, bin, grid, inverse) - first
        count = tl.max(some) if some.type.is_block() else some
    return first, count


# ---- whole pixels ----------------------------------------------------------------------------------


@triton.jit
def pixel_range(start, bin, grid, p, end):
    """First pixel of bin p and the one after its last, none of them ``end`` or more."""
    low = tl.minimum(tl.maximum(tl.floor(p.to(start.dtype) * bin) + start, 0), end)
    high = tl.minimum(tl.maximum(tl.ceil((p + 1).to(start.dtype) * bin) + start, 0), end)
    some = (grid > 0) & (end > 0)
    return tl.where(some, low, 0).to(tl.int32), tl.where(some, high, 0).to(tl.int32)


# ---- integrals -------------------------------------------------------------------------------------


@triton.jit
def pixels_met(start, bin, grid, p, size):
    """First pixel whose hat bin p meets and the one after the last, of those on the map."""
    low = tl.floor(start + p.to(start.dtype) * bin)
    high = tl.ceil(start + (p + 1).to(start.dtype) * bin) + 1
    low, high = tl.minimum(tl.maximum(low, 0), size), tl.minimum(tl.maximum(high, 0), size)
    return tl.where(grid > 0, low, 0).to(tl.int32), tl.where(grid > 0, high, 0).to(tl.int32)


@triton.jit
def _hat(t):
    return tl.maximum(1 - tl.abs(t), 0)


@triton.jit
def _integral(a, b, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Of the hat over the part of a to b where it is linear."""
    low, high = tl.maximum(a, LEFT), tl.minimum(b, RIGHT)
    return tl.maximum(high - low, 0) * _hat((low + high) * 0.5)


@triton.jit
def mean_of_hat(pixel, p, start, bin, SCALE: tl.constexpr, BINS: tl.constexpr, BY: tl.constexpr):
    """Of a pixel's hat, over bin p; or its derivative ``BY`` the region's ``"low"`` or ``"high"`` coordinate."""
    a = start + p.to(start.dtype) * bin - pixel
    b = start + (p + 1).to(start.dtype) * bin - pixel
    some = b > a  # far away, or of small bins, ends are rounded to each other
    width = tl.where(some, b - a, 1)
    mean = (_integral(a, b, -1, 0) + _integral(a, b, 0, 1)) / width
    if BY == "":
        return tl.where(some, mean, _hat(a))
    else:
        to_a, to_b = p.to(start.dtype) / BINS, (p + 1).to(start.dtype) / BINS
        if BY == "low":
            to_a, to_b = 1 - to_a, 1 - to_b
        return tl.where(some, SCALE * ((mean - _hat(a)) * to_a + (_hat(b) - mean) * to_b) / width, 0)


# ---- blocks of outputs: bins, each in several lanes, times channels -------------------------------


@triton.jit
def outputs_of(
    block, channels, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_BINS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Bins, lanes and channels of a block."""
    blocks = tl.cdiv(channels, BLOCK_C)
    lane = tl.arange(0, BLOCK_BINS * LANES)
    c = block % blocks * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    if CHANNELS_LAST:
        lane, c = lane[:, None], c[None, :]
    else:
        lane, c = lane[None, :], c[:, None]
    return block // blocks * BLOCK_BINS + lane // LANES, lane % LANES, c


@triton.jit
def split_lanes(x, CHANNELS_LAST: tl.constexpr, LANES: tl.constexpr):
    """A block with an axis of lanes: 1 in a channels-last one, else 2."""
    if CHANNELS_LAST:
        return tl.reshape(x, [x.shape[0] // LANES, LANES, x.shape[1]])
    else:
        return tl.reshape(x, [x.shape[0], x.shape[1] // LANES, LANES])


@triton.jit
def merge_lanes(x, CHANNELS_LAST: tl.constexpr, LANES: tl.constexpr):
    """A block where each lane has what its bin has."""
    if CHANNELS_LAST:
        x = tl.broadcast_to(x, [x.shape[0], LANES, x.shape[2]])
        return tl.reshape(x, [x.shape[0] * LANES, x.shape[2]])
    else:
        x = tl.broadcast_to(x, [x.shape[0], x.shape[1], LANES])
        return tl.reshape(x, [x.shape[0], x.shape[1] * LANES])


@triton.jit
def sum_lanes(x, CHANNELS_LAST: tl.constexpr, LANES: tl.constexpr):
    if LANES > 1:
        sums = tl.sum(split_lanes(x, CHANNELS_LAST, LANES), 1 if CHANNELS_LAST else 2, keep_dims=True)
        x = merge_lanes(sums, CHANNELS_LAST, LANES)
    return x


# ---- launchers -------------------------------------------------------------------------------------


def check_rois(boxes: Tensor, pooled_height: int, pooled_width: int, sampling_ratio: int = 0, columns: int = 5) -> None:
    """What memory safety and termination need, with the messages of the CPU kernels."""
    if boxes.dim() != 2 or boxes.shape[1] != columns:
        raise RuntimeError(f"boxes: expected shape [K, {columns}], got {list(boxes.shape)}")
    if pooled_height < 1 or pooled_width < 1:
        raise RuntimeError(f"output_size: expected at least 1 x 1, got {pooled_height} x {pooled_width}")
    if sampling_ratio > 2**30:
        raise RuntimeError(f"sampling_ratio: expected at most 2^30, got {sampling_ratio}")


def check_own_channels(input: Tensor, pooled_height: int, pooled_width: int) -> int:
    """The channels of the output where every bin has channels of its own."""
    bins = pooled_height * pooled_width
    if input.dim() != 4 or input.shape[1] % bins:
        got = input.shape[1] if input.dim() == 4 else list(input.shape)
        raise RuntimeError(f"input: expected a multiple of {bins} channels, got {got}")
    return input.shape[1] // bins


def check_grad(
    grad: Tensor, boxes: Tensor, channels: int, pooled_height: int, pooled_width: int, own_channels: bool = False
) -> None:
    """``channels``: of the map."""
    bins = pooled_height * pooled_width if own_channels else 1
    if list(grad.shape) != [boxes.shape[0], channels // bins, pooled_height, pooled_width] or channels % bins:
        wanted = f"[{boxes.shape[0]}, {channels} / {bins}, {pooled_height}, {pooled_width}]"
        raise RuntimeError(f"grad: expected shape {wanted}, got {list(grad.shape)}")


def coordinates(boxes: Tensor, features: Tensor) -> tl.dtype:
    """The type of coordinates."""
    return tl.float64 if torch.float64 in (boxes.dtype, features.dtype) else tl.float32


def empty_pooled(input: Tensor, boxes: Tensor, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    """An output ``[K, *size]`` in the memory format of the input."""
    memory_format = torch._prims_common.suggest_memory_format(input)
    return torch.empty(
        (boxes.shape[0], *size), dtype=dtype or input.dtype, device=input.device, memory_format=memory_format
    )


_PROGRAMS = 2048
"""At least so many where there are as many blocks: a few for each place on an H200's 132 multiprocessors."""


def split_outputs(input: Tensor, output: Tensor, own_channels: bool = False) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid of a kernel with a program for each region and every so many of its blocks, and what a block is."""
    count, channels, height, width = output.shape
    channels_last = input.stride(1) == 1 and not own_channels
    block = block_of(channels, height * width, channels_last, input.element_size(), input.is_cuda)
    blocks = triton.cdiv(channels, block["BLOCK_C"]) * triton.cdiv(height * width, block["BLOCK_BINS"])
    return (count, min(blocks, triton.cdiv(_PROGRAMS, count))), block


def block_of(
    channels: int, bins: int, channels_last: bool, element_size: int, on_device: bool = True
) -> dict[str, int]:
    """16 bytes of channels a thread where they are contiguous, and otherwise bins next to each other; several lanes for
    each bin where there are few."""
    block_c = triton.next_power_of_2(channels)
    if on_device:
        block_c = min(block_c, 512 // element_size if channels_last else 8)
        rows = 4096 // element_size // block_c if channels_last else 64
    else:  # an interpreter's time goes by the number of operations
        block_c = min(block_c, 256)
        rows = min(16384 // block_c, 256)
    block_bins = min(triton.next_power_of_2(bins), rows)
    return {
        "CHANNELS_LAST": channels_last, "BLOCK_C": block_c, "BLOCK_BINS": block_bins, "LANES": rows // block_bins
    }  # fmt: skip
