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
    check_grad,
    check_rois,
    coordinates,
    empty_pooled,
    load_box,
    make_axis,
    on_level,
    sample,
    samples_between,
)

_PROGRAMS = 2048
"""At least so many where there are as many blocks: a few for each place on an H200's 132 multiprocessors."""


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
    blocks = tl.cdiv(channels, BLOCK_C)
    for block in range(tl.program_id(1), tl.cdiv(PH * PW, BLOCK_BINS) * blocks, tl.num_programs(1)):
        bin = block // blocks * BLOCK_BINS + tl.arange(0, BLOCK_BINS * LANES) // LANES
        lane = tl.arange(0, BLOCK_BINS * LANES) % LANES
        c = block % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        if CHANNELS_LAST:
            bin, lane, c = bin[:, None], lane[:, None], c[None, :]
            sum = tl.zeros([BLOCK_BINS * LANES, BLOCK_C], SUM)
        else:
            bin, lane, c = bin[None, :], lane[None, :], c[:, None]
            sum = tl.zeros([BLOCK_C, BLOCK_BINS * LANES], SUM)
        mask, c = (bin < PH * PW) & (c < channels), c.to(tl.int64)
        features = input + image.to(tl.int64) * stride_n + (c * (PH * PW) + bin if OWN_CHANNELS else c) * stride_c
        ph, pw, reads = bin // PW, bin % PW, mask & (image >= 0)
        first_y, rows = samples_between(-1, height, y_start, y_bin, y_grid, y_inverse, ph)
        first_x, columns = samples_between(-1, width, x_start, x_bin, x_grid, x_inverse, pw)
        for i in range(rows):
            y, y_inside = sample(y_start, y_bin, y_grid, y_inverse, ph, first_y + i, height)
            row = features + y.to(tl.int32).to(tl.int64) * stride_y
            for j in range(0, columns, LANES):
                x, x_inside = sample(x_start, x_bin, x_grid, x_inverse, pw, first_x + lane + j, width)
                sum += _bilinear(
                    row + x.to(tl.int32).to(tl.int64) * stride_x, stride_y, stride_x, reads & y_inside & x_inside,
                    (y - tl.floor(y)).to(SUM), (x - tl.floor(x)).to(SUM), y < height - 1, x < width - 1,
                )  # fmt: skip
        at = output + k.to(tl.int64) * out_stride_k + c * out_stride_c + bin.to(tl.int64) * out_stride_bin
        tl.store(at, _sum_lanes(sum * scale, LANES, CHANNELS_LAST), mask=mask & (lane == 0))


@triton.jit
def _sum_lanes(x, LANES: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """In all lanes, the sum over those of a bin."""
    if LANES == 1:
        return x
    elif CHANNELS_LAST:
        lanes = tl.reshape(x, [x.shape[0] // LANES, LANES, x.shape[1]])
        return tl.reshape(tl.broadcast_to(tl.sum(lanes, 1, keep_dims=True), lanes.shape), x.shape)
    else:
        lanes = tl.reshape(x, [x.shape[0], x.shape[1] // LANES, LANES])
        return tl.reshape(tl.broadcast_to(tl.sum(lanes, 2, keep_dims=True), lanes.shape), x.shape)


@triton.jit
def _bilinear(pixel, stride_y, stride_x, mask, below, right, has_below, has_right):
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
    images, _, height, width = input.shape
    count, channels, pooled_height, pooled_width = output.shape
    if not output.numel():
        return
    channels_last = input.stride(1) == 1 and not own_channels
    # An interpreter's time goes by the number of operations.
    rows = 8 if input.is_cuda else 64
    block_c, block_bins, lanes = _block(
        channels, pooled_height * pooled_width, channels_last, input.element_size(), rows
    )
    blocks = triton.cdiv(channels, block_c) * triton.cdiv(pooled_height * pooled_width, block_bins)
    with on_device_of(input):
        _roi_align_kernel[(count, min(blocks, triton.cdiv(_PROGRAMS, count)))](
            input, boxes, output, images, channels, height, width, *input.stride(), *boxes.stride(),
            output.stride(0), output.stride(1), output.stride(3), PH=pooled_height, PW=pooled_width,
            SCALE=spatial_scale, FROM_AREA=areas[0], TO_AREA=areas[1], RATIO=max(sampling_ratio, 0), ALIGNED=aligned,
            OWN_CHANNELS=own_channels, DTYPE=coordinates(boxes, input), CHANNELS_LAST=channels_last, BLOCK_C=block_c,
            BLOCK_BINS=block_bins, LANES=lanes,
        )  # fmt: skip


def _block(channels: int, bins: int, channels_last: bool, element_size: int, rows: int) -> tuple[int, int, int]:
    """Channels, bins and samples of a bin at a time.

    16 bytes a thread where channels are contiguous and otherwise bins along the lanes of a warp; samples where bins are
    too few. ``rows``: of a block, 8 for what 4 warps hold of contiguous channels.
    """
    if channels_last:
        block_c = min(triton.next_power_of_2(channels), 512 // element_size)
        rows *= 512 // element_size // block_c
        block_bins = min(triton.next_power_of_2(bins), rows)
    else:
        rows *= 8
        block_bins = min(triton.next_power_of_2(bins), rows)
        block_c = min(triton.next_power_of_2(channels), 16)
    return block_c, block_bins, rows // block_bins


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


def _forward_variant(dtype: str, channels_last: bool, ratio: int, note: str) -> Variant:
    ints = ("images", "channels", "height", "width", "stride_n", "stride_c", "stride_y", "stride_x", "box_stride_k")
    ints += ("out_stride_k", "out_stride_c", "out_stride_bin")
    one = {"box_stride": 1, **({"stride_c": 1, "out_stride_c": 1} if channels_last else {"stride_x": 1})}
    block_c, block_bins, lanes = _block(256, 49, channels_last, {"fp32": 4, "fp16": 2}[dtype], 8)
    return Variant(
        _roi_align_kernel,
        {"input": f"*{dtype}", "boxes": "*fp32", "output": f"*{dtype}", **dict.fromkeys(ints, "i32")},
        {
            **one, "PH": 7, "PW": 7, "SCALE": 0.25, "FROM_AREA": None, "TO_AREA": 12544.0, "RATIO": ratio,
            "ALIGNED": False, "OWN_CHANNELS": False, "DTYPE": tl.float32, "CHANNELS_LAST": channels_last,
            "BLOCK_C": block_c, "BLOCK_BINS": block_bins, "LANES": lanes,
        },
        divisible=("channels", *(("stride_n", "stride_y", "stride_x", "out_stride_k", "out_stride_bin") if channels_last
                   else ("stride_n", "stride_c", "stride_y"))),
        note=note,
    )  # fmt: skip


VARIANTS = [
    _forward_variant("fp32", True, 2, "1000 regions of 256 x 200 x 272, 7 x 7: 106 MB, 25 us"),
    _forward_variant("fp16", True, 2, "the same: 53 MB, 12 us"),
    _forward_variant("fp32", False, 2, "contiguous: 106 MB, 25 us"),
    _forward_variant("fp16", False, 0, "contiguous, adaptive sampling: 53 MB, 12 us"),
    *variants("fp32", True, "512 regions to 256 x 200 x 304: 88 MB, 20 us"),
    variants("fp32", False, "contiguous, the same")[1],
    variants("fp16", True, "the same: 44 MB, 10 us")[1],
]
