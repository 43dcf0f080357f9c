"""RoIAlign of rotated regions, and its gradient.

As in ``roi_align.py``, a program takes a region and every so many blocks of its outputs, bins times channels; but a
turned grid is no product of rows and columns, so that each sample has a place of its own.

For the gradient, as in ``_roi_gradients.py``, a program owns a tile of pixels times a block of channels and goes
through the regions near it in order: no two programs meet, and results are the same in every run. The tile's corners in
the frame of a region say which of its bins, and which of their samples, may reach it.

Bytes for 1000 regions of 256 channels, 7 x 7 bins, on a 200 x 272 map in float32: the map 56 MB once, the output 50 MB:
25 us on an H200 (4.3 TB/s). From the first-level cache, with 2 x 2 samples a bin, 0.8 GB: 30 us at 128 bytes a clock.
Operations: 0.2 G multiply-adds, and 0.03 G instructions of a warp for places and weights. The gradient moves as much,
and a row of bins near a tile of 64 pixels has 2048 weights of 10 operations for each sample of a bin. Reasoned, not
measured.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._launch import Variant, on_device_of
from ._roi_gradients import WIDEST, bins_near, divide_map, make_tables, regions_near, tile_of
from ._rois import (
    block_of,
    check_grad,
    check_rois,
    coordinates,
    divide,
    empty_pooled,
    load_box,
    outputs_of,
    position,
    split_outputs,
    sum_lanes,
)
from .roi_align import bilinear

_RADIANS = tl.constexpr(math.pi / 180)


@triton.jit
def _sin_cos(degrees):
    """Of one angle, by Taylor's series within 45 degrees; multiples of 90 are exact. NaN where there is none."""
    while tl.abs(degrees) > 360:
        degrees = tl.fma(-tl.floor(degrees / 360 + 0.5), 360.0, degrees)
    quarter = tl.floor(degrees / 90 + 0.5)
    x = tl.fma(-quarter, 90.0, degrees) * _RADIANS
    sin, cos, odd, even = x, x * 0 + 1, x, x * 0 + 1
    for i in tl.static_range(1, 9):
        even = even * (-x * x) * (1.0 / (2 * i * (2 * i - 1)))
        odd = odd * (-x * x) * (1.0 / (2 * i * (2 * i + 1)))
        cos += even
        sin += odd
    turned = (quarter - 4 * tl.floor(quarter / 4)).to(tl.int32)
    a = tl.where(turned % 2 == 0, sin, cos)
    b = tl.where(turned % 2 == 0, cos, sin)
    return tl.where(turned >= 2, -a, a), tl.where((turned == 1) | (turned == 2), -b, b)


@triton.jit
def _load_region(
    boxes, k, stride_k, stride, images, PH: tl.constexpr, PW: tl.constexpr, SCALE: tl.constexpr, RATIO: tl.constexpr,
    ALIGNED: tl.constexpr, CLOCKWISE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Image or -1; centre in pixels of the map; sine and cosine; of either axis, in the region's frame, where its first
    bin starts, the size of a bin, and the samples along it, 0 in a region that gives nothing."""
    image, cx, cy, width, height = load_box(boxes, k, stride_k, stride, k >= 0, images, DTYPE)
    sin, cos = _sin_cos(tl.load(boxes + k.to(tl.int64) * stride_k + 5 * stride).to(DTYPE))
    offset = 0.5 if ALIGNED else 0.0
    cx, cy, width, height = cx * SCALE - offset, cy * SCALE - offset, width * SCALE, height * SCALE
    if not ALIGNED:
        width, height = tl.where(width < 1, 1, width), tl.where(height < 1, 1, height)
    exists = (tl.abs(cx) <= 1e9) & (tl.abs(cy) <= 1e9) & (cos == cos)
    exists &= (width > 0) & (height > 0) & (width <= 1e6) & (height <= 1e6)
    bin_h, bin_w = divide(height, PH), divide(width, PW)
    if RATIO > 0:
        grid_h, grid_w = tl.where(exists, RATIO, 0), tl.where(exists, RATIO, 0)
    else:
        grid_h = tl.where(exists, tl.ceil(bin_h), 0).to(tl.int32)
        grid_w = tl.where(exists, tl.ceil(bin_w), 0).to(tl.int32)
    return image, cy, cx, -sin if CLOCKWISE else sin, cos, -height / 2, bin_h, grid_h, -width / 2, bin_w, grid_w


@triton.jit
def _inverse(grid, DTYPE: tl.constexpr):
    return 1 / tl.maximum(grid, 1).to(DTYPE)


@triton.jit
def _on_map(v, u, cy, cx, sin, cos, height, width):
    """Where a sample at (v, u) of the region's frame reads a map that is not empty, and whether it counts."""
    y, x = v * cos - u * sin + cy, v * sin + u * cos + cx
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    return tl.minimum(tl.maximum(y, 0), height - 1), tl.minimum(tl.maximum(x, 0), width - 1), inside


@triton.jit
def _roi_align_rotated_kernel(
    input, boxes, output, images, channels, height, width, stride_n, stride_c, stride_y, stride_x, box_stride_k,
    box_stride, out_stride_k, out_stride_c, out_stride_bin, PH: tl.constexpr, PW: tl.constexpr, SCALE: tl.constexpr,
    RATIO: tl.constexpr, ALIGNED: tl.constexpr, CLOCKWISE: tl.constexpr, DTYPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_BINS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    k = tl.program_id(0)
    image, cy, cx, sin, cos, top, bin_h, grid_h, left, bin_w, grid_w = _load_region(
        boxes, k, box_stride_k, box_stride, images, PH, PW, SCALE, RATIO, ALIGNED, CLOCKWISE, DTYPE
    )
    inverse_h, inverse_w = _inverse(grid_h, DTYPE), _inverse(grid_w, DTYPE)
    # NaN where there is no such image: to raise would wait for the device.
    scale = tl.where(image >= 0, (inverse_h * inverse_w).to(SUM), float("nan"))
    rows = tl.where((image >= 0) & (height > 0) & (width > 0), grid_h, 0)
    blocks = tl.cdiv(PH * PW, BLOCK_BINS) * tl.cdiv(channels, BLOCK_C)
    for block in range(tl.program_id(1), blocks, tl.num_programs(1)):
        bin, lane, c = outputs_of(block, channels, CHANNELS_LAST, BLOCK_C, BLOCK_BINS, LANES)
        sum = tl.zeros((bin + c).shape, SUM)
        mask = (bin < PH * PW) & (c < channels)
        features = input + image.to(tl.int64) * stride_n + c * stride_c
        v_origin = top + (bin // PW).to(DTYPE) * bin_h
        u_origin = left + (bin % PW).to(DTYPE) * bin_w
        for i in range(rows):
            v = position(v_origin, bin_h, grid_h.to(DTYPE), inverse_h, tl.full((), i, tl.int32))
            for j in range(0, grid_w, LANES):
                u = position(u_origin, bin_w, grid_w.to(DTYPE), inverse_w, lane + j)
                y, x, inside = _on_map(v, u, cy, cx, sin, cos, height, width)
                row, column = y.to(tl.int32), x.to(tl.int32)
                sum += bilinear(
                    features + (row.to(tl.int64) * stride_y + column.to(tl.int64) * stride_x), stride_y, stride_x,
                    mask & inside & (lane + j < grid_w), (y - row.to(DTYPE)).to(SUM), (x - column.to(DTYPE)).to(SUM),
                    row < height - 1, column < width - 1,
                )  # fmt: skip
        at = output + k.to(tl.int64) * out_stride_k + c * out_stride_c + bin.to(tl.int64) * out_stride_bin
        tl.store(at, sum_lanes(sum * scale, CHANNELS_LAST, LANES), mask=mask & (lane == 0))


# ---- gradient ------------------------------------------------------------------------------------


@triton.jit
def _store_reach(extent, centre, half):
    # Pixels to spare, and more where coordinates are so large that they are rounded to pixels.
    slack = 2 + 1e-5 * (tl.abs(centre) + half)
    tl.store(extent, tl.minimum(tl.maximum(centre - half - slack, -1e9), 1e9).to(tl.int32))
    tl.store(extent + 1, tl.minimum(tl.maximum(centre + half + slack, -1e9), 1e9).to(tl.int32))


@triton.jit
def _extents_kernel(
    boxes, extents, members, images, box_stride_k, box_stride, PH: tl.constexpr, PW: tl.constexpr, SCALE: tl.constexpr,
    RATIO: tl.constexpr, ALIGNED: tl.constexpr, CLOCKWISE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What that of ``_roi_gradients.py`` stores, of one region."""
    k = tl.program_id(0)
    image, cy, cx, sin, cos, top, _, grid_h, left, _, _ = _load_region(
        boxes, k, box_stride_k, box_stride, images, PH, PW, SCALE, RATIO, ALIGNED, CLOCKWISE, DTYPE
    )
    belongs = (image >= 0) & (grid_h > 0)
    extent = extents + k.to(tl.int64) * 5
    tl.store(extent, tl.where(belongs, image, -1))
    _store_reach(extent + 1, cy, tl.abs(top * cos) + tl.abs(left * sin))
    _store_reach(extent + 3, cx, tl.abs(top * sin) + tl.abs(left * cos))
    # Integers: the order of these operations changes nothing.
    tl.atomic_min(members + image, k, mask=belongs)
    tl.atomic_min(members + images + image, -k, mask=belongs)


@triton.jit
def _samples_near(low, high, origin, step, grid):
    """The first sample of a bin that may lie from ``low`` to ``high``, and how many may do."""
    first = tl.minimum(tl.maximum(tl.floor((low - origin) / step - 1), 0), grid).to(tl.int32)
    return first, tl.minimum((high - low) / step + 3, grid).to(tl.int32)


@triton.jit
def _weights(
    y, x, v_origin, u_origin, v_low, v_high, u_low, u_high, cy, cx, sin, cos, bin_h, grid_h, bin_w, grid_w, height,
    width,
):  # fmt: skip
    """The weights of pixels, whose samples lie within ``low`` and ``high``, in the bins that start there."""
    inverse_h, inverse_w = _inverse(grid_h, v_origin.dtype), _inverse(grid_w, v_origin.dtype)
    first_i, rows = _samples_near(v_low, v_high, v_origin, bin_h * inverse_h, grid_h)
    first_j, columns = _samples_near(u_low, u_high, u_origin, bin_w * inverse_w, grid_w)
    weight = tl.zeros((y + u_origin).shape, v_origin.dtype)
    for i in range(first_i, tl.minimum(first_i + rows, grid_h)):
        v = position(v_origin, bin_h, grid_h.to(v_origin.dtype), inverse_h, tl.full((), i, tl.int32))
        for n in range(columns):
            j = first_j + n
            u = position(u_origin, bin_w, grid_w.to(v_origin.dtype), inverse_w, j)
            at_y, at_x, inside = _on_map(v, u, cy, cx, sin, cos, height, width)
            share = tl.maximum(1 - tl.abs(y - at_y), 0) * tl.maximum(1 - tl.abs(x - at_x), 0)
            weight += tl.where(inside & (j < grid_w), share, 0)
    return weight * (inverse_h * inverse_w)


@triton.jit
def _gather_kernel(
    grad, boxes, extents, members, gradient, images, channels, height, width, tiles, tiles_x, box_stride_k, box_stride,
    stride_n, stride_c, stride_y, stride_x, PH: tl.constexpr, PW: tl.constexpr, SCALE: tl.constexpr,
    RATIO: tl.constexpr, ALIGNED: tl.constexpr, CLOCKWISE: tl.constexpr, DTYPE: tl.constexpr, BLOCK_C: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if gradient.dtype.element_ty == tl.float64 else tl.float32
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    top, left = tile // tiles_x * TILE_Y, tile % tiles_x * TILE_X
    pixel = tl.arange(0, TILE_Y * TILE_X)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    sum = tl.zeros([TILE_Y * TILE_X, BLOCK_C], SUM)
    y, x, mask, c = top + pixel // TILE_X, left + pixel % TILE_X, c < channels, c.to(tl.int64)
    first, last = tl.load(members + image), -tl.load(members + images + image)
    for chunk in range(first // 32, last // 32 + 1):
        near = regions_near(extents, chunk, first, last, image, top, top + TILE_Y - 1, left, left + TILE_X - 1)
        while near != 0:
            lowest = near & -near
            near -= lowest
            k = chunk * 32 + (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # the exponent
            _, cy, cx, sin, cos, v_start, bin_h, grid_h, u_start, bin_w, grid_w = _load_region(
                boxes, k, box_stride_k, box_stride, images, PH, PW, SCALE, RATIO, ALIGNED, CLOCKWISE, DTYPE
            )
            # The tile and a pixel around it, in the region's frame.
            dy, dx = top + (TILE_Y - 1) * 0.5 - cy, left + (TILE_X - 1) * 0.5 - cx
            v, u = dy * cos + dx * sin, dx * cos - dy * sin
            slack = 0.01 + 1e-5 * (tl.abs(cy) + tl.abs(cx) + tl.abs(v) + tl.abs(u))
            reach_v = (TILE_Y + 1) * 0.5 * tl.abs(cos) + (TILE_X + 1) * 0.5 * tl.abs(sin) + slack
            reach_u = (TILE_Y + 1) * 0.5 * tl.abs(sin) + (TILE_X + 1) * 0.5 * tl.abs(cos) + slack
            row, row_end = bins_near(v - reach_v, v + reach_v, v_start, bin_h, PH)
            column, column_end = bins_near(u - reach_u, u + reach_u, u_start, bin_w, PW)
            pooled = grad + k.to(tl.int64) * (PH * PW) * channels + c
            for block in range(column // BINS, tl.cdiv(column_end, BINS)):
                p = block * BINS + tl.arange(0, BINS)[None, :]
                for i in range(row_end - row):
                    ph = row + i
                    weights = _weights(
                        y, x, v_start + ph.to(DTYPE) * bin_h, u_start + p.to(DTYPE) * bin_w, v - reach_v, v + reach_v,
                        u - reach_u, u + reach_u, cy, cx, sin, cos, bin_h, grid_h, bin_w, grid_w, height, width,
                    )  # fmt: skip
                    for pw in range(tl.maximum(column, block * BINS), tl.minimum(column_end, block * BINS + BINS)):
                        g = tl.load(pooled + (ph * PW + pw).to(tl.int64) * channels, mask=mask, other=0).to(SUM)
                        weight = tl.sum(tl.where(p == pw, weights, 0), 1, keep_dims=True).to(SUM)
                        # An infinite gradient stays out of pixels that have no part in it.
                        sum = tl.where(weight != 0, sum + weight * g, sum)
    at = image.to(tl.int64) * stride_n + c * stride_c + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    tl.store(gradient + at, sum, mask=mask & (y < height) & (x < width))


# ---- launchers -----------------------------------------------------------------------------------


def _region(boxes, features, scale, pooled_height, pooled_width, sampling_ratio, aligned, clockwise) -> dict:
    check_rois(boxes, pooled_height, pooled_width, columns=6)
    if sampling_ratio > 2**15:
        raise RuntimeError(f"sampling_ratio: expected at most 2^15, got {sampling_ratio}")
    return {
        "PH": pooled_height, "PW": pooled_width, "SCALE": scale, "RATIO": max(sampling_ratio, 0), "ALIGNED": aligned,
        "CLOCKWISE": clockwise, "DTYPE": coordinates(boxes, features),
    }  # fmt: skip


def _warps(block: dict[str, int]) -> int:
    return 8 if block["CHANNELS_LAST"] else 4  # a bin a warp


def roi_align_rotated(input, boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned, clockwise):
    if input.dim() != 4:
        raise RuntimeError(f"input: expected shape [N, C, H, W], got {list(input.shape)}")
    region = _region(boxes, input, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned, clockwise)
    images, channels, height, width = input.shape
    output = empty_pooled(input, boxes, channels, pooled_height, pooled_width)
    if not output.numel():
        return output
    grid, block = split_outputs(input, output)
    with on_device_of(input):
        _roi_align_rotated_kernel[grid](
            input, boxes, output, images, channels, height, width, *input.stride(), *boxes.stride(),
            output.stride(0), output.stride(1), output.stride(3), **region, **block, num_warps=_warps(block),
        )  # fmt: skip
    return output


def roi_align_rotated_backward(
    grad, boxes, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width, sampling_ratio,
    aligned, clockwise,
):  # fmt: skip
    region = _region(boxes, grad, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned, clockwise)
    check_grad(grad, boxes, channels, pooled_height, pooled_width)
    shape = batch_size, channels, height, width
    memory_format = torch._prims_common.suggest_memory_format(grad)
    gradient = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
    if not gradient.numel():
        return gradient
    if not grad.numel():
        return gradient.zero_()
    # Lanes go along channels. Copied once, regions' gradients are read by several tiles.
    grad = grad.contiguous(memory_format=torch.channels_last)
    extents, members = make_tables(grad, batch_size)
    tile, tiles, tiles_x = divide_map(grad, height, width, WIDEST["align"])
    tile.pop("OWN_CHANNELS")
    with on_device_of(grad):
        _extents_kernel[(grad.shape[0],)](boxes, extents, members, batch_size, *boxes.stride(), **region, num_warps=1)
        _gather_kernel[(batch_size * tiles, triton.cdiv(channels, tile["BLOCK_C"]))](
            grad, boxes, extents, members, gradient, batch_size, channels, height, width, tiles, tiles_x,
            *boxes.stride(), *gradient.stride(), **region, **tile, num_warps=8,
        )  # fmt: skip
    return gradient


# ---- compiled ahead --------------------------------------------------------------------------------


def _variant(kernel: triton.JITFunction, dtype: str, channels_last: bool, note: str, **region) -> Variant:
    """256 channels and 7 x 7 bins."""
    region = {
        "PH": 7, "PW": 7, "SCALE": 0.25, "RATIO": 2, "ALIGNED": True, "CLOCKWISE": False, "DTYPE": tl.float32, **region
    }  # fmt: skip
    types = dict.fromkeys([n for n in kernel.arg_names if n.islower()], "i32")
    types |= {n: f"*{dtype}" for n in ("input", "output", "grad", "gradient") if n in types}
    types |= {"boxes": "*fp32"} | {n: "*i32" for n in ("extents", "members") if n in types}
    ones = ("box_stride", *(("stride_c", "out_stride_c") if channels_last else ("stride_x", "out_stride_bin")))
    divisible = ("channels", "out_stride_k", "stride_n", "stride_y") + (("stride_x",) if channels_last else ())
    block, warps = {}, 1
    if kernel is _roi_align_rotated_kernel:
        block = block_of(256, 49, channels_last, {"fp32": 4, "fp16": 2}[dtype])
        warps = _warps(block)
    elif kernel is _gather_kernel:
        block, warps = tile_of(256, 200, 304, 7, False, WIDEST["align"], 4096), 8
        block.pop("OWN_CHANNELS")
    constants = {n: 1 for n in ones if n in types} | region | block
    divisible = tuple(n for n in divisible if n in types)
    return Variant(kernel, types, constants, divisible, num_warps=warps, note=note)


VARIANTS = [
    _variant(_roi_align_rotated_kernel, "fp32", True, "1000 regions of 256 x 200 x 272, 7 x 7: 106 MB, 25 us"),
    _variant(_roi_align_rotated_kernel, "fp16", True, "the same: 53 MB, 12 us"),
    _variant(_roi_align_rotated_kernel, "fp32", False, "contiguous, adaptive sampling: 106 MB, 25 us", RATIO=0),
    _variant(_extents_kernel, "fp32", True, "1000 regions: 44 KB; a launch"),
    _variant(_gather_kernel, "fp32", True, "512 regions to 256 x 200 x 304: 88 MB, 20 us"),
    _variant(_gather_kernel, "fp16", True, "the same, adaptive sampling: 44 MB, 10 us", RATIO=0),
    _variant(_gather_kernel, "fp32", False, "contiguous: 88 MB, 20 us"),
]
