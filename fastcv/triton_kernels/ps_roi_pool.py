"""Position-sensitive RoI pooling: the mean over the pixels of each bin, which has channels of its own.

As in ``ps_roi_align.py``, whose gradient this shares with other weights. Bytes for R-FCN's 300 regions of 21 classes
and 7 x 7 bins on a map of 1029 x 38 x 63 in float32: 9.9 MB in, 1.2 MB out, 3 us from memory, and 9 pixels of 32 bytes
for each of 0.3 M outputs, 90 MB from the second-level cache, 16 us.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import Variant, on_device_of
from ._roi_gradients import gather, variants
from ._rois import (
    block_of,
    check_grad,
    check_own_channels,
    check_rois,
    coordinates,
    empty_pooled,
    load_box,
    make_axis,
    outputs_of,
    pixel_range,
    split_outputs,
    sum_lanes,
)


@triton.jit
def _ps_roi_pool_kernel(
    input, boxes, output, images, channels, height, width, stride_n, stride_c, stride_y, stride_x, box_stride_k,
    box_stride, out_stride_k, out_stride_c, out_stride_bin, PH: tl.constexpr, PW: tl.constexpr, SCALE: tl.constexpr,
    DTYPE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_BINS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    k = tl.program_id(0)
    image, x1, y1, x2, y2 = load_box(boxes, k, box_stride_k, box_stride, k >= 0, images, DTYPE)
    y_start, y_bin, y_grid, _ = make_axis(y1, y2, SCALE, PH, "mean", 0, True)
    x_start, x_bin, x_grid, _ = make_axis(x1, x2, SCALE, PW, "mean", 0, True)
    blocks = tl.cdiv(PH * PW, BLOCK_BINS) * tl.cdiv(channels, BLOCK_C)
    for block in range(tl.program_id(1), blocks, tl.num_programs(1)):
        bin, lane, c = outputs_of(block, channels, CHANNELS_LAST, BLOCK_C, BLOCK_BINS, LANES)
        mask = (bin < PH * PW) & (c < channels)
        features = input + image.to(tl.int64) * stride_n + (c * (PH * PW) + bin) * stride_c
        top, bottom = pixel_range(y_start, y_bin, y_grid, bin // PW, height - 1)  # never the last row or column
        left, right = pixel_range(x_start, x_bin, x_grid, bin % PW, width - 1)
        sum = tl.zeros((bin + c).shape, SUM)
        columns = tl.max(right - left)
        for i in range(tl.max(bottom - top)):
            y = top + i
            row, row_reads = features + y.to(tl.int64) * stride_y, mask & (y < bottom) & (image >= 0)
            for j in range(0, columns, LANES):
                x = left + lane + j
                sum += tl.load(row + x.to(tl.int64) * stride_x, mask=row_reads & (x < right), other=0).to(SUM)
        pixels = tl.maximum(bottom - top, 1).to(SUM) * tl.maximum(right - left, 1).to(SUM)
        # NaN where there is no such image: to raise would wait for the device.
        mean = tl.where(image >= 0, sum_lanes(sum, CHANNELS_LAST, LANES) / pixels, float("nan"))
        at = k.to(tl.int64) * out_stride_k + c * out_stride_c + bin.to(tl.int64) * out_stride_bin
        tl.store(output + at, mean, mask=mask & (lane == 0))


def ps_roi_pool(input, boxes, spatial_scale, pooled_height, pooled_width):
    check_rois(boxes, pooled_height, pooled_width)
    channels = check_own_channels(input, pooled_height, pooled_width)
    output = empty_pooled(input, boxes, channels, pooled_height, pooled_width)
    if not output.numel():
        return output
    grid, block = split_outputs(input, output, own_channels=True)
    images, _, height, width = input.shape
    with on_device_of(input):
        _ps_roi_pool_kernel[grid](
            input, boxes, output, images, channels, height, width, *input.stride(), *boxes.stride(),
            output.stride(0), output.stride(1), output.stride(3), PH=pooled_height, PW=pooled_width,
            SCALE=spatial_scale, DTYPE=coordinates(boxes, input), **block,
        )  # fmt: skip
    return output


def ps_roi_pool_backward(
    grad, boxes, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width
):  # fmt: skip
    check_rois(boxes, pooled_height, pooled_width)
    check_grad(grad, boxes, channels, pooled_height, pooled_width, own_channels=True)
    shape = batch_size, channels, height, width
    return gather(grad, boxes, shape, spatial_scale, pooling="mean", own_channels=True)


def _forward_variant(dtype: str, note: str) -> Variant:
    types = dict.fromkeys([n for n in _ps_roi_pool_kernel.arg_names if n.islower()], "i32")
    types |= {"input": f"*{dtype}", "boxes": "*fp32", "output": f"*{dtype}"}
    constants = {
        **dict.fromkeys(("box_stride", "stride_x", "out_stride_bin"), 1), "PH": 7, "PW": 7, "SCALE": 0.0625,
        "DTYPE": tl.float32, **block_of(21, 49, False, {"fp32": 4, "fp16": 2}[dtype]),
    }  # fmt: skip
    return Variant(_ps_roi_pool_kernel, types, constants, note=note)


VARIANTS = [
    _forward_variant("fp32", "300 regions of 21 x 7 x 7 x 38 x 63: 11 MB, 3 us, and 90 MB of sectors"),
    _forward_variant("fp16", "the same"),
    variants("fp32", False, "the same: 11 MB, 3 us", POOLING="mean", RATIO=0, OWN_CHANNELS=True)[1],
]
