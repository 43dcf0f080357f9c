"""RoI pooling: the maximum over each bin of a region, and where it is.

A program takes a region and every so many blocks of its outputs: bins times channels. It goes over the pixels of its
bins in reading order, with the greatest value so far and its position in registers. Lanes go along what is contiguous:
channels of a channels-last map, else bins.

Bytes for 1000 regions of 256 channels, 7 x 7 bins, on a 200 x 272 map in float32: the map 56 MB, values and positions
100 MB: 36 us. Comparisons: every pixel of a region once, about 700 x 256 x 1000 = 0.2 G, of 6 instructions each: 40 us.

The gradient is in ``_roi_gradients.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Variant, on_device_of
from ._roi_gradients import gather, variants
from ._rois import (
    block_of,
    check_grad,
    check_rois,
    coordinates,
    empty_pooled,
    load_box,
    make_axis,
    merge_lanes,
    outputs_of,
    pixel_range,
    split_lanes,
    split_outputs,
)


@triton.jit
def _roi_pool_kernel(
    input, boxes, output, argmax, images, channels, height, width, stride_n, stride_c, stride_y, stride_x, box_stride_k,
    box_stride, out_stride_k, out_stride_c, out_stride_bin, PH: tl.constexpr, PW: tl.constexpr, SCALE: tl.constexpr,
    DTYPE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_BINS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    k = tl.program_id(0)
    image, x1, y1, x2, y2 = load_box(boxes, k, box_stride_k, box_stride, k >= 0, images, DTYPE)
    y_start, y_bin, y_grid, _ = make_axis(y1, y2, SCALE, PH, "max", 0, True)
    x_start, x_bin, x_grid, _ = make_axis(x1, x2, SCALE, PW, "max", 0, True)
    blocks = tl.cdiv(PH * PW, BLOCK_BINS) * tl.cdiv(channels, BLOCK_C)
    for block in range(tl.program_id(1), blocks, tl.num_programs(1)):
        bin, lane, c = outputs_of(block, channels, CHANNELS_LAST, BLOCK_C, BLOCK_BINS, LANES)
        mask = (bin < PH * PW) & (c < channels)
        features = input + image.to(tl.int64) * stride_n + c * stride_c
        top, bottom = pixel_range(y_start, y_bin, y_grid, bin // PW, height)
        left, right = pixel_range(x_start, x_bin, x_grid, bin % PW, width)
        some = mask & (top < bottom) & (left < right) & (image >= 0)
        # Where all of a bin is -infinity or NaN its first pixel stays.
        best = tl.where(some, float("-inf"), 0.0).to(SUM)
        place = tl.where(some, top * width + left, -1)
        columns = tl.max(right - left)
        for i in range(tl.max(bottom - top)):
            y = top + i
            row, row_reads = features + y.to(tl.int64) * stride_y, some & (y < bottom)
            for j in range(0, columns, LANES):
                x = left + lane + j
                reads = row_reads & (x < right)
                value = tl.load(row + x.to(tl.int64) * stride_x, mask=reads, other=float("-inf")).to(SUM)
                wins = value > best  # never NaN
                place = tl.where(wins, y * width + x, place)
                best = tl.where(wins, value, best)
        best, place = _first_best(best, place, CHANNELS_LAST, LANES)
        # NaN where there is no such image: to raise would wait for the device.
        best = tl.where(image >= 0, best, float("nan"))
        at = k.to(tl.int64) * out_stride_k + c * out_stride_c + bin.to(tl.int64) * out_stride_bin
        tl.store(output + at, best, mask=mask & (lane == 0))
        tl.store(argmax + at, place, mask=mask & (lane == 0))


@triton.jit
def _first_best(best, place, CHANNELS_LAST: tl.constexpr, LANES: tl.constexpr):
    """In all lanes of a bin the greatest value, and the first of the places where it is."""
    if LANES > 1:
        axis: tl.constexpr = 1 if CHANNELS_LAST else 2
        values = split_lanes(best, CHANNELS_LAST, LANES)
        greatest = tl.max(values, axis, keep_dims=True)
        places = tl.where(values == greatest, split_lanes(place, CHANNELS_LAST, LANES), 2**31 - 1)
        best = merge_lanes(greatest, CHANNELS_LAST, LANES)
        place = merge_lanes(tl.min(places, axis, keep_dims=True), CHANNELS_LAST, LANES)
    return best, place


def _check_pixels(height: int, width: int) -> None:
    if height * width >= 2**31 - 1:
        raise RuntimeError(f"input: expected fewer than 2^31 pixels per channel, got {height} x {width}")


def roi_pool(input, boxes, spatial_scale, pooled_height, pooled_width):
    if input.dim() != 4:
        raise RuntimeError(f"input: expected shape [N, C, H, W], got {list(input.shape)}")
    check_rois(boxes, pooled_height, pooled_width)
    images, channels, height, width = input.shape
    _check_pixels(height, width)
    size = channels, pooled_height, pooled_width
    output, argmax = empty_pooled(input, boxes, *size), empty_pooled(input, boxes, *size, dtype=torch.int32)
    if not output.numel():
        return output, argmax
    grid, block = split_outputs(input, output)
    with on_device_of(input):
        _roi_pool_kernel[grid](
            input, boxes, output, argmax, images, channels, height, width, *input.stride(), *boxes.stride(),
            output.stride(0), output.stride(1), output.stride(3), PH=pooled_height, PW=pooled_width,
            SCALE=spatial_scale, DTYPE=coordinates(boxes, input), **block,
        )  # fmt: skip
    return output, argmax


def roi_pool_backward(
    grad, boxes, argmax, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width
):  # fmt: skip
    """Positions that lie outside their bins count for nothing: to raise would wait for the device."""
    check_rois(boxes, pooled_height, pooled_width)
    check_grad(grad, boxes, channels, pooled_height, pooled_width)
    if argmax.shape != grad.shape or argmax.dtype != torch.int32:
        raise RuntimeError(f"argmax: expected int32 {list(grad.shape)}, got {argmax.dtype} {list(argmax.shape)}")
    _check_pixels(height, width)
    shape = batch_size, channels, height, width
    return gather(grad, boxes, shape, spatial_scale, pooling="max", argmax=argmax)


def _forward_variant(dtype: str, channels_last: bool, note: str) -> Variant:
    types = dict.fromkeys([n for n in _roi_pool_kernel.arg_names if n.islower()], "i32")
    types |= {"input": f"*{dtype}", "boxes": "*fp32", "output": f"*{dtype}", "argmax": "*i32"}
    ones = ("box_stride", *(("stride_c", "out_stride_c") if channels_last else ("stride_x", "out_stride_bin")))
    divisible = ("stride_n", "stride_y", *(("stride_x", "out_stride_bin") if channels_last else ()))
    constants = {
        **dict.fromkeys(ones, 1), "PH": 7, "PW": 7, "SCALE": 0.25, "DTYPE": tl.float32,
        **block_of(256, 49, channels_last, {"fp32": 4, "fp16": 2}[dtype]),
    }  # fmt: skip
    return Variant(_roi_pool_kernel, types, constants, ("channels", "out_stride_k", *divisible), note=note)


VARIANTS = [
    _forward_variant("fp32", True, "1000 regions of 256 x 200 x 272, 7 x 7: 156 MB, 36 us"),
    _forward_variant("fp32", False, "contiguous, the same"),
    _forward_variant("fp16", True, "the same: 103 MB, 24 us"),
    variants("fp32", True, "512 regions to 256 x 200 x 304: 113 MB, 26 us", POOLING="max", RATIO=0)[1],
    variants("fp16", False, "contiguous, the same: 69 MB, 16 us", POOLING="max", RATIO=0)[1],
]
