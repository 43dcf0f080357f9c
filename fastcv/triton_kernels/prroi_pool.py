"""Precise RoI pooling: the mean over each bin of the interpolated map, and its derivatives by a region's coordinates.

As in ``roi_align.py``, a program takes a region and every so many blocks of its outputs, bins times channels, and goes
over the pixels whose hats (the shares that pixels have in the interpolated map) a bin meets. Their weights are products
of one of the row and one of the column. Derivatives by coordinates have other weights. The gradient is in
``_roi_gradients.py``; that of coordinates is four such forward passes.

Bytes for 1000 regions of 256 channels, 7 x 7 bins of 2 x 2 pixels, on a 200 x 272 map in float32: the map 56 MB once,
the output 50 MB: 25 us on an H200 (4.3 TB/s). Operations: 9 to 16 taps a bin, 0.2 G multiply-adds, and their weights,
30 operations each, once per bin for all channels of a block: 0.03 G instructions of a warp, 40 us. Reasoned, not
measured.
"""

from __future__ import annotations

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
    mean_of_hat,
    outputs_of,
    pixels_met,
    split_outputs,
    sum_lanes,
)

_BY = (("", ""), ("", "low"), ("low", ""), ("", "high"), ("high", ""))  # rows, columns: of parts 0 to 4


@triton.jit
def _prroi_pool_kernel(
    input, boxes, output, images, channels, height, width, stride_n, stride_c, stride_y, stride_x, box_stride_k,
    box_stride, out_stride_k, out_stride_c, out_stride_bin, PH: tl.constexpr, PW: tl.constexpr, SCALE: tl.constexpr,
    BY_Y: tl.constexpr, BY_X: tl.constexpr, DTYPE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_BINS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    k = tl.program_id(0)
    image, x1, y1, x2, y2 = load_box(boxes, k, box_stride_k, box_stride, k >= 0, images, DTYPE)
    y_start, y_bin, y_grid, _ = make_axis(y1, y2, SCALE, PH, "precise", 0, True)
    x_start, x_bin, x_grid, _ = make_axis(x1, x2, SCALE, PW, "precise", 0, True)
    blocks = tl.cdiv(PH * PW, BLOCK_BINS) * tl.cdiv(channels, BLOCK_C)
    for block in range(tl.program_id(1), blocks, tl.num_programs(1)):
        bin, lane, c = outputs_of(block, channels, CHANNELS_LAST, BLOCK_C, BLOCK_BINS, LANES)
        mask = (bin < PH * PW) & (c < channels)
        features = input + image.to(tl.int64) * stride_n + c * stride_c
        top, bottom = pixels_met(y_start, y_bin, y_grid, bin // PW, height)
        left, right = pixels_met(x_start, x_bin, x_grid, bin % PW, width)
        sum = tl.zeros((bin + c).shape, SUM)
        columns = tl.max(right - left)
        for i in range(tl.max(bottom - top)):
            y = top + i
            row, row_reads = features + y.to(tl.int64) * stride_y, mask & (y < bottom) & (image >= 0)
            row_weight = mean_of_hat(y, bin // PW, y_start, y_bin, SCALE, PH, BY_Y)
            for j in range(0, columns, LANES):
                x = left + lane + j
                weight = (row_weight * mean_of_hat(x, bin % PW, x_start, x_bin, SCALE, PW, BY_X)).to(SUM)
                sum += weight * tl.load(row + x.to(tl.int64) * stride_x, mask=row_reads & (x < right), other=0).to(SUM)
        # NaN where there is no such image: to raise would wait for the device.
        total = tl.where(image >= 0, sum_lanes(sum, CHANNELS_LAST, LANES), float("nan"))
        at = k.to(tl.int64) * out_stride_k + c * out_stride_c + bin.to(tl.int64) * out_stride_bin
        tl.store(output + at, total, mask=mask & (lane == 0))


def _check_part(part: int) -> None:
    if not 0 <= part < len(_BY):
        raise RuntimeError(f"part: expected 0 to {len(_BY) - 1}, got {part}")


def prroi_pool(input, boxes, spatial_scale, pooled_height, pooled_width, part):
    if input.dim() != 4:
        raise RuntimeError(f"input: expected shape [N, C, H, W], got {list(input.shape)}")
    check_rois(boxes, pooled_height, pooled_width)
    _check_part(part)
    images, channels, height, width = input.shape
    output = empty_pooled(input, boxes, channels, pooled_height, pooled_width)
    if not output.numel():
        return output
    grid, block = split_outputs(input, output)
    with on_device_of(input):
        _prroi_pool_kernel[grid](
            input, boxes, output, images, channels, height, width, *input.stride(), *boxes.stride(),
            output.stride(0), output.stride(1), output.stride(3), PH=pooled_height, PW=pooled_width,
            SCALE=spatial_scale, BY_Y=_BY[part][0], BY_X=_BY[part][1], DTYPE=coordinates(boxes, input), **block,
        )  # fmt: skip
    return output


def prroi_pool_backward(
    grad, boxes, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width, part
):  # fmt: skip
    check_rois(boxes, pooled_height, pooled_width)
    _check_part(part)
    check_grad(grad, boxes, channels, pooled_height, pooled_width)
    shape = batch_size, channels, height, width
    return gather(grad, boxes, shape, spatial_scale, pooling="precise", by=_BY[part])


def _forward_variant(dtype: str, channels_last: bool, part: int, note: str) -> Variant:
    """256 channels and 7 x 7 bins."""
    types = dict.fromkeys([n for n in _prroi_pool_kernel.arg_names if n.islower()], "i32")
    types |= {"input": f"*{dtype}", "boxes": "*fp32", "output": f"*{dtype}"}
    ones = ("box_stride", *(("stride_c", "out_stride_c") if channels_last else ("stride_x", "out_stride_bin")))
    divisible = ("stride_n", "stride_y", *(("stride_x", "out_stride_bin") if channels_last else ()))
    constants = {
        **dict.fromkeys(ones, 1), "PH": 7, "PW": 7, "SCALE": 0.25, "BY_Y": _BY[part][0], "BY_X": _BY[part][1],
        "DTYPE": tl.float32, **block_of(256, 49, channels_last, {"fp32": 4, "fp16": 2}[dtype]),
    }  # fmt: skip
    return Variant(_prroi_pool_kernel, types, constants, ("channels", "out_stride_k", *divisible), note=note)


_PRECISE = {"POOLING": "precise", "RATIO": 0}
VARIANTS = [
    _forward_variant("fp32", True, 0, "1000 regions of 256 x 200 x 272, 7 x 7: 106 MB, 25 us"),
    _forward_variant("fp16", True, 0, "the same: 53 MB, 12 us"),
    _forward_variant("fp32", False, 1, "contiguous, derivative by x1: 106 MB, 25 us"),
    variants("fp32", True, "512 regions to 256 x 200 x 304: 88 MB, 20 us", **_PRECISE)[1],
    variants("fp16", False, "contiguous, derivative by y2: 44 MB, 10 us", **_PRECISE, BY_Y="high")[1],
]
