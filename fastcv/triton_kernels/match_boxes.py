"""Boxes matched to ground truth, without the matrix of IoUs and without waiting.

A program has a block of boxes and goes over the ground truths, some at once. Where every ground truth's best boxes are
matched too, a first launch finds its greatest IoU: over the block, then one atomic maximum of integers, whose order is
that of numbers that are not negative, so that no run differs from another.

Floor for 217,413 anchors of 800 x 1088 by 20 ground truths: 5.2 MB, 2 us at 4.3 TB/s with both launches; 4.3 M IoUs of
some 20 operations, twice, 3 us at 60 TFLOP/s; two launches. Reasoned, not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._boxes import INTERPRETED, ROUNDED, iou, load_corners
from ._launch import Variant, on_device_of

_TRUTHS = 16  # at once
_BOXES = 4096 if INTERPRETED else 128  # of a program; the interpreter's time goes by the number of programs
_LAUNCH = {"num_warps": 8} | ROUNDED


@triton.jit
def _ious(mine, truth, g, truths):
    """[boxes, ground truths]: 0 where there is no intersection, or a NaN, and -1 where there is no ground truth."""
    value = iou(load_corners(truth, g, g < truths), mine)
    return tl.where(g < truths, tl.where(value > 0, value, 0), -1)


@triton.jit
def _match_boxes_most_kernel(truth, boxes, most, truths, count, BOXES: tl.constexpr, TRUTHS: tl.constexpr):
    """most: bits of the greatest IoU of each ground truth, zero before."""
    BITS: tl.constexpr = most.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BOXES + tl.arange(0, BOXES)[:, None]
    mine = load_corners(boxes, i, i < count)
    for first in range(0, truths, TRUTHS):
        g = first + tl.arange(0, TRUTHS)
        greatest = tl.max(_ious(mine, truth, g[None, :], truths), 0)
        tl.atomic_max(most + g, greatest.to(BITS, bitcast=True), mask=greatest > 0, sem="relaxed")


@triton.jit
def _match_boxes_kernel(
    truth, boxes, most, matches, truths, count, high: tl.float64, low: tl.float64, LOW_QUALITY: tl.constexpr,
    BOXES: tl.constexpr, TRUTHS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BOXES + tl.arange(0, BOXES)[:, None]
    mine = load_corners(boxes, i, i < count)
    NUMBER: tl.constexpr = boxes.dtype.element_ty
    best, which = tl.full((BOXES, TRUTHS), -1, NUMBER), tl.zeros((BOXES, TRUTHS), tl.int32)
    chosen = tl.zeros((BOXES, TRUTHS), tl.int32)
    for first in range(0, truths, TRUTHS):
        g = first + tl.arange(0, TRUTHS)[None, :]
        value = _ious(mine, truth, g, truths)
        which = tl.where(value > best, g, which)
        best = tl.maximum(value, best)
        if LOW_QUALITY:
            chosen |= (value == tl.load(most + g, mask=g < truths, other=-2)).to(tl.int32)
    greatest = tl.max(best, 1, keep_dims=True)
    match = tl.min(tl.where(best == greatest, which, 2**31 - 1), 1, keep_dims=True)
    matched = greatest >= tl.full((), high, tl.float64).to(NUMBER)
    if LOW_QUALITY:
        matched |= tl.max(chosen, 1, keep_dims=True) > 0
    below = greatest < tl.full((), low, tl.float64).to(NUMBER)
    tl.store(matches + i, tl.where(matched, match, tl.where(below, -1, -2)).to(tl.int64), mask=i < count)


def match_boxes(gt_boxes, boxes, high_threshold, low_threshold, allow_low_quality_matches):
    for name, x, letter in (("gt_boxes", gt_boxes, "M"), ("boxes", boxes, "N")):
        if x.dim() != 2 or x.shape[1] != 4:
            raise RuntimeError(f"{name}: expected shape [{letter}, 4], got {list(x.shape)}")
    if boxes.dtype not in (torch.float32, torch.float64) or gt_boxes.dtype != boxes.dtype:
        raise RuntimeError(f"boxes: expected float32 or float64, as gt_boxes, got {boxes.dtype} and {gt_boxes.dtype}")
    truths, count = gt_boxes.shape[0], boxes.shape[0]
    if truths >= 2**31 - _TRUTHS:
        raise RuntimeError(f"gt_boxes: expected less than 2^31 boxes, got {truths}")
    matches = torch.full((count,), -1, device=boxes.device)
    if not truths or not count:
        return matches
    gt_boxes, boxes = gt_boxes.contiguous(), boxes.contiguous()
    grid, block = (triton.cdiv(count, _BOXES),), {"BOXES": _BOXES, "TRUTHS": _TRUTHS, **_LAUNCH}
    most = gt_boxes.new_zeros(truths if allow_low_quality_matches else 1)
    with on_device_of(boxes):
        if allow_low_quality_matches:
            bits = most.view(torch.int64 if boxes.dtype == torch.float64 else torch.int32)
            _match_boxes_most_kernel[grid](gt_boxes, boxes, bits, truths, count, **block)
        _match_boxes_kernel[grid](
            gt_boxes, boxes, most, matches, truths, count, high_threshold, low_threshold,
            LOW_QUALITY=allow_low_quality_matches, **block,
        )  # fmt: skip
    return matches


def _variants(dtype: str, bits: str, note: str) -> list[Variant]:
    types = {"truth": f"*{dtype}", "boxes": f"*{dtype}", "matches": "*i64", "truths": "i32", "count": "i32"}
    block = {"BOXES": 128, "TRUTHS": _TRUTHS}
    both = types | {"most": f"*{dtype}", "high": "fp64", "low": "fp64"}
    return [
        Variant(_match_boxes_most_kernel, types | {"most": f"*{bits}"}, block, note=note, **_LAUNCH),
        Variant(_match_boxes_kernel, both, {"LOW_QUALITY": True} | block, note=note, **_LAUNCH),
    ]


VARIANTS = [
    *_variants("fp32", "i32", "217,413 anchors by 20 ground truths: half of 5.2 MB and of 4.3 M IoUs twice, 2 us"),
    *_variants("fp64", "i64", "the same: 10 MB, 3 us, and 90 M operations in float64"),
]
