"""Gradients of the RoI operators, gathered: a tile of pixels adds what regions give it.

A program owns a tile of pixels of one image times a block of channels, holds its sums in registers and goes through the
image's regions in order. So no two programs meet, and results are the same in every run. Which regions touch a tile, a
first kernel prepares: of each region the image and the rows and columns that it may touch, of each image its first and
its last region (regions commonly come sorted by image). A tile tests 32 regions at once.

Bytes: the gradient once out, the regions' gradients in, as often as tiles meet a bin, mostly from the caches.
Operations: a bin of b x b pixels meets a tile of T x U in ((b + 1) / T + 1) ((b + 1) / U + 1) tiles on average, and
each pair costs T U multiply-adds a channel. For 512 regions of 256 channels, 7 x 7 bins of about 3 x 3 pixels, on a map
of 200 x 304 in float32 with tiles of 8 x 8: 62 MB out and 26 MB in, 20 us; 25 000 bins in 2.25 pairs of 64 x 256, 0.9 G
multiply-adds and as many selections, 60 us with the weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant, on_device_of
from ._rois import coordinates, load_box, make_axis, mean_of_hat, on_level, pixel_range, sample, samples_between

_NOWHERE = 2**31 - 1
WIDEST = {"align": 64, "mean": 64, "precise": 64, "max": 32}
"""Channels of a tile at most; more of them spill registers with the last."""


@triton.jit
def store_extent(extent, start, size, mask):
    # Pixels to spare, and more where coordinates are so large that they are rounded to pixels.
    slack = 2 + 1e-5 * (tl.abs(start) + tl.abs(size))
    first = tl.minimum(start, start + size) - slack
    last = tl.maximum(start, start + size) + slack
    tl.store(extent, tl.minimum(tl.maximum(first, -1e9), 1e9).to(tl.int32), mask=mask)
    tl.store(extent + 1, tl.minimum(tl.maximum(last, -1e9), 1e9).to(tl.int32), mask=mask)


@triton.jit
def _extents_kernel(
    boxes, extents, members, count, images, box_stride_k, box_stride, PH: tl.constexpr, PW: tl.constexpr,
    SCALE: tl.constexpr, FROM_AREA: tl.constexpr, TO_AREA: tl.constexpr, POOLING: tl.constexpr, RATIO: tl.constexpr,
    ALIGNED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each region: image or -1, first and last row, first and last column. Of each image: its first and last."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = k < count
    image, x1, y1, x2, y2 = load_box(boxes, k, box_stride_k, box_stride, mask, images, DTYPE)
    y, y_bin, y_grid, _ = make_axis(y1, y2, SCALE, PH, POOLING, RATIO, ALIGNED)
    x, x_bin, x_grid, _ = make_axis(x1, x2, SCALE, PW, POOLING, RATIO, ALIGNED)
    belongs = on_level((image >= 0) & (y_grid > 0) & (x_grid > 0), x1, y1, x2, y2, FROM_AREA, TO_AREA)
    extent = extents + k.to(tl.int64) * 5
    tl.store(extent, tl.where(belongs, image, -1), mask=mask)
    store_extent(extent + 1, y, y_bin * PH, mask)
    store_extent(extent + 3, x, x_bin * PW, mask)
    # Integers: the order of these operations changes nothing.
    tl.atomic_min(members + image, k, mask=belongs)
    tl.atomic_min(members + images + image, -k, mask=belongs)


@triton.jit
def regions_near(extents, chunk, first, last, image, top, bottom, left, right):
    """A bit for each of 32 regions: whether it belongs to the image and may touch these pixels."""
    bit = tl.arange(0, 32)
    k = chunk * 32 + bit
    extent = extents + k.to(tl.int64) * 5
    mask = (k >= first) & (k <= last)
    near = mask & (tl.load(extent, mask=mask, other=-1) == image)
    near &= (tl.load(extent + 1, mask=mask, other=0) <= bottom) & (tl.load(extent + 2, mask=mask, other=0) >= top)
    near &= (tl.load(extent + 3, mask=mask, other=0) <= right) & (tl.load(extent + 4, mask=mask, other=0) >= left)
    return tl.sum(near.to(tl.int64) << bit)


@triton.jit
def bins_near(low, high, start, bin, BINS: tl.constexpr):
    """The first bin that may reach from ``low`` to ``high`` and the one after the last; all where ``bin`` is 0."""
    a, b = (low - start) / bin, (high - start) / bin  # infinite or NaN where it is, and NaN is never the lesser
    slack = 0.01 + 1e-5 * (tl.abs(a) + tl.abs(b))
    first = tl.minimum(tl.maximum(tl.minimum(a, b) - slack, 0), BINS)
    last = tl.maximum(tl.minimum(tl.maximum(a, b) + slack, BINS - 1), -1)
    return tl.floor(first).to(tl.int32), tl.floor(last).to(tl.int32) + 1


@triton.jit
def _axis_weights(
    pixel, p, low, high, size, start, bin, grid, inverse, POOLING: tl.constexpr, SCALE: tl.constexpr,
    BINS: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """The weights of pixels, all of them from ``low`` to ``high``, in bins p."""
    if POOLING == "mean":
        begin, end = pixel_range(start, bin, grid, p, size - 1)
        return tl.where((pixel >= begin) & (pixel < end), 1 / tl.maximum(end - begin, 1).to(start.dtype), 0)
    elif POOLING == "precise":
        return mean_of_hat(pixel, p, start, bin, SCALE, BINS, BY)
    else:
        origin = start + p.to(start.dtype) * bin
        first, count = samples_between(low - 1, high + 1, origin, bin, grid, inverse)
        weight = tl.zeros((pixel + p).shape, start.dtype)
        for i in range(count):
            at, inside = sample(origin, bin, grid, inverse, first + i, size)
            weight += tl.where(inside, tl.maximum(1 - tl.abs(pixel - at), 0), 0)
        return weight * inverse


@triton.jit
def _add_region(
    sum, grad, argmax, channels, mask, y, x, top, bottom, left, right, height, width, y_start, y_bin, y_grid, y_inverse,
    x_start, x_bin, x_grid, x_inverse, own, PH: tl.constexpr, PW: tl.constexpr, SCALE: tl.constexpr,
    POOLING: tl.constexpr, BY_Y: tl.constexpr, BY_X: tl.constexpr, OWN_CHANNELS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Adds what the bins of one region give these pixels."""
    row, row_end = bins_near(top - 1, bottom + 1, y_start, y_bin, PH)
    column, column_end = bins_near(left - 1, right + 1, x_start, x_bin, PW)
    place = y * width + x
    if OWN_CHANNELS:
        row, row_end = tl.maximum(row, own // PW), tl.minimum(row_end, own // PW + 1)
        column, column_end = tl.maximum(column, own % PW), tl.minimum(column_end, own % PW + 1)
    for block in range(column // BINS, tl.cdiv(column_end, BINS)):
        p = block * BINS + tl.arange(0, BINS)[None, :]
        if POOLING != "max":
            weights = _axis_weights(
                x, p, left, right, width, x_start, x_bin, x_grid, x_inverse, POOLING, SCALE, PW, BY_X
            )
        for i in range(row_end - row):
            ph = row + i
            if POOLING != "max":
                row_weight = _axis_weights(
                    y, ph, top, bottom, height, y_start, y_bin, y_grid, y_inverse, POOLING, SCALE, PH, BY_Y
                )
            for pw in range(tl.maximum(column, block * BINS), tl.minimum(column_end, block * BINS + BINS)):
                bin = (ph * PW + pw).to(tl.int64) * channels
                g = tl.load(grad + bin, mask=mask, other=0).to(sum.dtype)
                if POOLING == "max":
                    sum += tl.where(tl.load(argmax + bin, mask=mask, other=-1) == place, g, 0)
                else:
                    weight = weights
                    if BINS > 1:
                        weight = tl.sum(tl.where(p == pw, weights, 0), 1, keep_dims=True)
                    weight = (row_weight * weight).to(sum.dtype)
                    # An infinite gradient stays out of pixels that have no part in it.
                    sum = tl.where(weight != 0, sum + weight * g, sum)
    return sum


@triton.jit
def _gather_kernel(
    grad, argmax, boxes, extents, members, gradient, images, channels, height, width, tiles, tiles_x, box_stride_k,
    box_stride, stride_n, stride_c, stride_y, stride_x, PH: tl.constexpr, PW: tl.constexpr,
    SCALE: tl.constexpr, POOLING: tl.constexpr, BY_Y: tl.constexpr, BY_X: tl.constexpr, RATIO: tl.constexpr,
    ALIGNED: tl.constexpr, OWN_CHANNELS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_C: tl.constexpr, TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if gradient.dtype.element_ty == tl.float64 else tl.float32
    image, tile, own = tl.program_id(0) // tiles, tl.program_id(0) % tiles, 0
    if OWN_CHANNELS:
        image, own = image // (PH * PW), image % (PH * PW)
    top, left = tile // tiles_x * TILE_Y, tile % tiles_x * TILE_X
    bottom, right = top + TILE_Y - 1, left + TILE_X - 1
    pixel = tl.arange(0, TILE_Y * TILE_X)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    sum = tl.zeros([TILE_Y * TILE_X, BLOCK_C], SUM)
    y, x, mask, c = top + pixel // TILE_X, left + pixel % TILE_X, c < channels, c.to(tl.int64)
    first, last = tl.load(members + image), -tl.load(members + images + image)
    for chunk in range(first // 32, last // 32 + 1):
        near = regions_near(extents, chunk, first, last, image, top, bottom, left, right)
        while near != 0:
            lowest = near & -near
            near -= lowest
            k = chunk * 32 + (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # the exponent
            _, x1, y1, x2, y2 = load_box(boxes, k, box_stride_k, box_stride, k >= 0, images, DTYPE)
            y_start, y_bin, y_grid, y_inverse = make_axis(y1, y2, SCALE, PH, POOLING, RATIO, ALIGNED)
            x_start, x_bin, x_grid, x_inverse = make_axis(x1, x2, SCALE, PW, POOLING, RATIO, ALIGNED)
            pooled = k.to(tl.int64) * (PH * PW) * channels + c
            sum = _add_region(
                sum, grad + pooled, argmax + pooled, channels, mask, y, x, top, bottom, left, right, height, width,
                y_start, y_bin, y_grid, y_inverse, x_start, x_bin, x_grid, x_inverse, own, PH, PW, SCALE,
                POOLING, BY_Y, BY_X, OWN_CHANNELS, BINS,
            )  # fmt: skip
    if OWN_CHANNELS:
        c = c * (PH * PW) + own
    at = image.to(tl.int64) * stride_n + c * stride_c + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    tl.store(gradient + at, sum, mask=mask & (y < height) & (x < width))


def gather(
    grad: Tensor,
    boxes: Tensor,
    shape: tuple[int, int, int, int],
    spatial_scale: float,
    *,
    pooling: str,
    sampling_ratio: int = 0,
    aligned: bool = True,
    areas: tuple[float | None, float | None] = (None, None),
    argmax: Tensor | None = None,
    own_channels: bool = False,
    by: tuple[str, str] = ("", ""),
) -> Tensor:
    """The gradient of the map, ``[N, C, H, W]``.

    Args:
        grad: of the pooled regions, any strides.
        areas: regions from the first to below the second of these have a part in it.
        argmax: with the pooling ``"max"``.
        own_channels: whether every bin has channels of its own.
        by: with the pooling ``"precise"``, of rows and columns, as of ``mean_of_hat``.
    """
    memory_format = torch._prims_common.suggest_memory_format(grad)
    gradient = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
    if not gradient.numel():
        return gradient
    if not grad.numel():
        return gradient.zero_()
    # Lanes go along channels. Copied once, regions' gradients are read by several tiles.
    grad = grad.contiguous(memory_format=torch.channels_last)
    argmax = grad if argmax is None else argmax.contiguous(memory_format=torch.channels_last)
    images, _, height, width = shape
    count, channels, pooled_height, pooled_width = grad.shape
    extents, members = make_tables(grad, images)
    tile, tiles, tiles_x = divide_map(grad, height, width, WIDEST[pooling], own_channels)
    bins = pooled_height * pooled_width if own_channels else 1
    region = {
        "PH": pooled_height, "PW": pooled_width, "SCALE": spatial_scale, "POOLING": pooling,
        "RATIO": max(sampling_ratio, 0), "ALIGNED": aligned, "DTYPE": coordinates(boxes, grad),
    }  # fmt: skip
    with on_device_of(grad):
        _extents_kernel[(triton.cdiv(count, 128),)](
            boxes, extents, members, count, images, *boxes.stride(), **region, FROM_AREA=areas[0], TO_AREA=areas[1],
            BLOCK=128,
        )  # fmt: skip
        _gather_kernel[(images * bins * tiles, triton.cdiv(channels, tile["BLOCK_C"]))](
            grad, argmax, boxes, extents, members, gradient, images, channels, height, width, tiles, tiles_x,
            *boxes.stride(), *gradient.stride(), **region, **tile, BY_Y=by[0], BY_X=by[1], num_warps=8,
        )  # fmt: skip
    return gradient


def make_tables(grad: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Extents of regions and members of images, for a first kernel to write."""
    extents = torch.empty((grad.shape[0], 5), dtype=torch.int32, device=grad.device)
    return extents, torch.full((2, images), _NOWHERE, dtype=torch.int32, device=grad.device)


def divide_map(
    grad: Tensor, height: int, width: int, widest: int, own_channels: bool = False
) -> tuple[dict[str, int], int, int]:
    """What a tile is, of at most ``widest`` channels; tiles of an image, and in a row of it."""
    sums = 4096 if grad.element_size() < 8 else 2048  # 16 a thread in float32
    # An interpreter's time goes by the number of operations.
    sizes = (widest, sums) if grad.is_cuda else (256, 65536)
    tile = tile_of(grad.shape[1], height, width, grad.shape[3], own_channels, *sizes)
    across = triton.cdiv(width, tile["TILE_X"])
    return tile, across * triton.cdiv(height, tile["TILE_Y"]), across


def tile_of(
    channels: int, height: int, width: int, pooled_width: int, own_channels: bool, widest: int, sums: int
) -> dict[str, int]:
    """A tile of so many sums at most, as square as may be, and how many columns of bins get weights at a time."""
    block_c = min(triton.next_power_of_2(channels), widest)
    pixels = sums // block_c
    tile_x = min(1 << pixels.bit_length() // 2, triton.next_power_of_2(width))
    bins = 1 if own_channels else min(triton.next_power_of_2(pooled_width), 16)
    tile_y = min(pixels // tile_x, triton.next_power_of_2(height))
    tile = {"BLOCK_C": block_c, "TILE_Y": tile_y, "TILE_X": tile_x, "BINS": bins}
    return {"OWN_CHANNELS": own_channels, **tile}


def variants(dtype: str, channels_last: bool, note: str, **region) -> list[Variant]:
    """Both kernels for 256 channels, or 21 of every bin's own, and 7 x 7 bins."""
    own_channels, by = (
        region.pop("OWN_CHANNELS", False),
        {"BY_Y": region.pop("BY_Y", ""), "BY_X": region.pop("BY_X", "")},
    )
    region = {
        "PH": 7, "PW": 7, "SCALE": 0.25, "POOLING": "align", "RATIO": 2, "ALIGNED": False, "DTYPE": tl.float32, **region
    }  # fmt: skip
    tile = tile_of(21 if own_channels else 256, 200, 304, 7, own_channels, WIDEST[region["POOLING"]], 4096)
    names = [n for n in _gather_kernel.arg_names if n.islower()]
    types = dict.fromkeys(names, "i32") | {"boxes": "*fp32", "extents": "*i32", "members": "*i32"}
    types |= {"grad": f"*{dtype}", "gradient": f"*{dtype}"}
    types["argmax"] = "*i32" if region["POOLING"] == "max" else f"*{dtype}"
    ones = dict.fromkeys(("box_stride", "stride_c" if channels_last else "stride_x"), 1)
    divisible = ("stride_n", "stride_y") + (() if own_channels else ("channels",))
    extents = {n: types.get(n, "i32") for n in ("boxes", "extents", "members", "count", "images", "box_stride_k")}
    bounds = {"box_stride": 1, "FROM_AREA": None, "TO_AREA": None, "BLOCK": 128}
    return [
        Variant(_extents_kernel, extents, {**bounds, **region}, note="1000 regions: 40 KB; a launch"),
        Variant(_gather_kernel, types, {**ones, **region, **tile, **by}, divisible, num_warps=8, note=note),
    ]
