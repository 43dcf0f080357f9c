"""RoIAlign on one map and on the levels of a pyramid.

A program takes a region and every so many blocks of its outputs: bins times channels. It computes where the samples of
its bins lie and their bilinear weights, loads their four pixels in all of its channels, and adds in registers. Lanes go
along what is contiguous: channels of a channels-last map, else bins, whose pixels are neighbours. A pyramid is a launch
per level over all regions; programs whose region is pooled from another level return at once.

Bytes for 1000 regions of 256 channels, 7 x 7 bins, on a 200 x 272 map in float32: the map 56 MB once, the output 50 MB:
25 us. From the first-level cache, with 2 x 2 samples a bin, 0.8 GB: 30 us at 128 bytes a clock. Operations: 0.2 G
multiply-adds and the weights, once per bin for all channels of a block: 0.02 G instructions of a warp, 40 us.

The gradient is in ``_roi_gradients.py``.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

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
    on_level,
    outputs_of,
    sample,
    samples_between,
    split_outputs,
    sum_lanes,
)


@triton.jit
def _roi_align_kernel(
    input, boxes, output, images, channels, height, width, stride_n, stride_c, stride_y, stride_x, box_stride_k,
    box_stride, out_stride_k, out_stride_c, out_stride_bin, PH: tl.constexpr, PW: tl.constexpr, SCALE: tl.constexpr,
    FROM_AREA: tl.constexpr, TO_AREA: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr,
    OWN_CHANNELS: tl.constexpr, DTYPE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_BINS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    k = tl.program_id(0)
    image, x1, y1, x2, y2 = load_box(boxes, k, box_stride_k, box_stride, k >= 0, images, DTYPE)
    if not on_level(k >= 0, x1, y1, x2, y2, FROM_AREA, TO_AREA):
        return
    y_start, y_bin, y_grid, y_inverse = make_axis(y1, y2, SCALE, PH, "align", RATIO, ALIGNED)
    x_start, x_bin, x_grid, x_inverse = make_axis(x1, x2, SCALE, PW, "align", RATIO, ALIGNED)
    # NaN where there is no such image: to raise would wait for the device.
    scale = tl.where(image >= 0, (y_inverse * x_inverse).to(SUM), float("nan"))
    blocks = tl.cdiv(PH * PW, BLOCK_BINS) * tl.cdiv(channels, BLOCK_C)
    for block in range(tl.program_id(1), blocks, tl.num_programs(1)):
        bin, lane, c = outputs_of(block, channels, CHANNELS_LAST, BLOCK_C, BLOCK_BINS, LANES)
        sum = tl.zeros((bin + c).shape, SUM)
        mask = (bin < PH * PW) & (c < channels)
        features = input + image.to(tl.int64) * stride_n + (c * (PH * PW) + bin if OWN_CHANNELS else c) * stride_c
        reads = mask & (image >= 0) & (height > 0) & (width > 0)
        y_origin = y_start + (bin // PW).to(DTYPE) * y_bin
        x_origin = x_start + (bin % PW).to(DTYPE) * x_bin
        first_y, rows = samples_between(-1, height, y_origin, y_bin, y_grid, y_inverse)
        first_x, columns = samples_between(-1, width, x_origin, x_bin, x_grid, x_inverse)
        for i in range(rows):
            y, y_inside = sample(y_origin, y_bin, y_grid, y_inverse, first_y + i, height)
            row = y.to(tl.int32).to(tl.int64) * stride_y
            for j in range(0, columns, LANES):
                x, x_inside = sample(x_origin, x_bin, x_grid, x_inverse, first_x + lane + j, width)
                sum += bilinear(
                    features + (row + x.to(tl.int32).to(tl.int64) * stride_x), stride_y, stride_x,
                    reads & y_inside & x_inside, (y - tl.floor(y)).to(SUM), (x - tl.floor(x)).to(SUM),
                    y < height - 1, x < width - 1,
                )  # fmt: skip
        at = output + k.to(tl.int64) * out_stride_k + c * out_stride_c + bin.to(tl.int64) * out_stride_bin
        tl.store(at, sum_lanes(sum * scale, CHANNELS_LAST, LANES), mask=mask & (lane == 0))


@triton.jit
def bilinear(pixel, stride_y, stride_x, mask, below, right, has_below, has_right):
    """The mean of four pixels from ``pixel`` on; those past the end of the map are not loaded."""
    a = tl.load(pixel, mask=mask, other=0).to(below.dtype)
    b = tl.load(pixel + stride_x, mask=mask & has_right, other=0).to(below.dtype)
    c = tl.load(pixel + stride_y, mask=mask & has_below, other=0).to(below.dtype)
    d = tl.load(pixel + stride_y + stride_x, mask=mask & has_below & has_right, other=0).to(below.dtype)
    return (1 - below) * ((1 - right) * a + right * b) + below * ((1 - right) * c + right * d)


def pool(
    input: Tensor,
    boxes: Tensor,
    output: Tensor,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    areas: tuple[float | None, float | None] = (None, None),
    own_channels: bool = False,
) -> None:
    """Writes the outputs of regions with an area from the first to below the second of ``areas``."""
    if not output.numel():
        return
    images, _, height, width = input.shape
    _, channels, pooled_height, pooled_width = output.shape
    grid, block = split_outputs(input, output, own_channels)
    with on_device_of(input):
        _roi_align_kernel[grid](
            input, boxes, output, images, channels, height, width, *input.stride(), *boxes.stride(),
            output.stride(0), output.stride(1), output.stride(3), PH=pooled_height, PW=pooled_width,
            SCALE=spatial_scale, FROM_AREA=areas[0], TO_AREA=areas[1], RATIO=max(sampling_ratio, 0), ALIGNED=aligned,
            OWN_CHANNELS=own_channels, DTYPE=coordinates(boxes, input), **block,
        )  # fmt: skip


def roi_align(input, boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned):
    scales = [spatial_scale]
    return multiscale_roi_align([input], boxes, scales, pooled_height, pooled_width, sampling_ratio, aligned, 224, 4)


def multiscale_roi_align(
    inputs, boxes, spatial_scales, pooled_height, pooled_width, sampling_ratio, aligned, canonical_scale,
    canonical_level,
):  # fmt: skip
    if not inputs or len(inputs) != len(spatial_scales):
        raise RuntimeError(
            f"inputs: expected one tensor per spatial scale, got {len(inputs)} tensors and {len(spatial_scales)} scales"
        )
    first = inputs[0]
    if any(m.dim() != 4 or m.shape[:2] != first.shape[:2] or m.dtype != first.dtype for m in inputs):
        raise RuntimeError("inputs: expected 4-D maps [N, C, H, W] of one N, C and dtype")
    check_rois(boxes, pooled_height, pooled_width, sampling_ratio)
    output = empty_pooled(first, boxes, first.shape[1], pooled_height, pooled_width)
    areas = _areas(spatial_scales, canonical_scale, canonical_level)
    for input, scale, of_level in zip(inputs, spatial_scales, areas, strict=True):
        pool(input, boxes, output, scale, sampling_ratio, aligned, of_level)
    return output


def _areas(scales: list[float], canonical_scale: int, canonical_level: int) -> list[tuple[float | None, float | None]]:
    """Bounds of the areas of regions that each level is for, None where there is no bound.

    Equation 1 of FPN asks of a region on level k or a coarser one: ``canonical_level + log2(sqrt(area) /
    canonical_scale) + 1e-6 >= k``. Solved for the area, so that no level depends on how a device rounds logarithms.
    """
    bounds, reached = [], None
    for scale in scales[:-1]:
        exponent = round(-math.log2(scale)) + 1 - canonical_level - 1e-6
        bound = (canonical_scale * 2.0 ** min(max(exponent, -60), 60)) ** 2
        bounds.append((reached, bound))
        reached = bound if reached is None else max(reached, bound)
    return [*bounds, (reached, None)]


def roi_align_backward(
    grad, boxes, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width, sampling_ratio,
    aligned,
):  # fmt: skip
    return multiscale_roi_align_backward(
        grad, boxes, [spatial_scale], pooled_height, pooled_width, batch_size, channels, [height], [width],
        sampling_ratio, aligned, 224, 4,
    )[0]  # fmt: skip


def multiscale_roi_align_backward(
    grad, boxes, spatial_scales, pooled_height, pooled_width, batch_size, channels, heights, widths, sampling_ratio,
    aligned, canonical_scale, canonical_level,
):  # fmt: skip
    if not heights or not len(heights) == len(widths) == len(spatial_scales):
        raise RuntimeError("heights, widths: expected one number per spatial scale")
    check_rois(boxes, pooled_height, pooled_width, sampling_ratio)
    check_grad(grad, boxes, channels, pooled_height, pooled_width)
    constants = {"pooling": "align", "sampling_ratio": sampling_ratio, "aligned": aligned}
    areas = _areas(spatial_scales, canonical_scale, canonical_level)
    return [
        gather(grad, boxes, (batch_size, channels, height, width), scale, areas=of_level, **constants)
        for height, width, scale, of_level in zip(heights, widths, spatial_scales, areas, strict=True)
    ]


def forward_variant(dtype: str, channels_last: bool, note: str, **constants: object) -> Variant:
    """256 channels, or 21 of every bin's own, and 7 x 7 bins."""
    own_channels = constants.get("OWN_CHANNELS", False)
    types = dict.fromkeys([n for n in _roi_align_kernel.arg_names if n.islower()], "i32")
    types |= {"input": f"*{dtype}", "boxes": "*fp32", "output": f"*{dtype}"}
    ones = ("box_stride", *(("stride_c", "out_stride_c") if channels_last else ("stride_x", "out_stride_bin")))
    divisible = ("stride_n", "stride_y", *(("stride_x", "out_stride_bin") if channels_last else ()))
    block = block_of(21 if own_channels else 256, 49, channels_last and not own_channels, {"fp32": 4, "fp16": 2}[dtype])
    constants = {
        **dict.fromkeys(ones, 1), "PH": 7, "PW": 7, "SCALE": 0.25, "FROM_AREA": None, "TO_AREA": 12544.0, "RATIO": 2,
        "ALIGNED": False, "OWN_CHANNELS": False, "DTYPE": tl.float32, **block, **constants,
    }  # fmt: skip
    return Variant(_roi_align_kernel, types, constants, ("channels", "out_stride_k", *divisible), note=note)


VARIANTS = [
    forward_variant("fp32", True, "1000 regions of 256 x 200 x 272, 7 x 7: 106 MB, 25 us"),
    forward_variant("fp16", True, "the same: 53 MB, 12 us"),
    forward_variant("fp32", False, "contiguous: 106 MB, 25 us"),
    forward_variant("fp16", False, "contiguous, adaptive sampling: 53 MB, 12 us", RATIO=0),
    *variants("fp32", True, "512 regions to 256 x 200 x 304: 88 MB, 20 us"),
    variants("fp32", False, "contiguous, the same")[1],
    variants("fp16", True, "the same: 44 MB, 10 us")[1],
]
