"""Soft-NMS on the device: a program for each class.

A step is one pass over the boxes of the class: each has its score lowered by the box chosen last, and the best of them
is the next. Boxes lie in the order of their rows, so that ties go to the lowest. Scores lie in global memory, where
each thread reads what it wrote itself.

Bytes: 24 a box (48 in float64), read once a step, from the caches. Operations: for each box chosen and each of the
class, 25. Floor for 80 classes of 500 boxes, of which all are chosen: 5e8, 0.01 ms at 60 TFLOP/s; but steps follow each
other, and each waits for its reductions and for what it loads, some 1000 cycles: 0.3 ms, for any number of classes up
to that of the multiprocessors. A class of 10,000 takes ten times as long a step. Reasoned, not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from ._boxes import INTERPRETED, ROUNDED, iou, load_corners, number_type, round_down
from ._launch import Variant, on_device_of

_INTERPRETED = tl.constexpr(INTERPRETED)
_BLOCK = 1024
_LAUNCH = {"num_warps": 16} | ROUNDED


@triton.jit
def _exp(x):
    """Triton's own is an approximation in float32."""
    if _INTERPRETED or x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def _soft_nms_kernel(
    boxes, scores, chosen, ends, iou_threshold: tl.float64, minus_inverse_sigma: tl.float64,
    score_threshold: tl.float64, METHOD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scores: of boxes that take part; they are lowered. chosen: of a box its score when it is chosen, 0 before.
    Classes end at ends[0], ends[1], ..."""
    NUMBER: tl.constexpr = scores.dtype.element_ty
    limit = tl.full((), iou_threshold, tl.float64).to(NUMBER)
    least = tl.full((), score_threshold, tl.float64).to(NUMBER)
    fall = tl.full((), minus_inverse_sigma, tl.float64).to(NUMBER)
    k = tl.program_id(0)
    first, end = tl.load(ends + k - 1, mask=k > 0, other=0), tl.load(ends + k)
    last, steps = first - first - 1, end - first
    while steps > 0:
        better = load_corners(boxes, last, last >= 0)
        best, place = tl.zeros((BLOCK,), NUMBER), tl.zeros((BLOCK,), tl.int64)
        for tile in range(first, end, BLOCK):
            i = tile + tl.arange(0, BLOCK)
            score = tl.load(scores + i, mask=i < end, other=0)
            mine = load_corners(boxes, i, score > 0)
            o = iou(better, mine)  # with no box NaN
            if METHOD == "gaussian":
                score *= tl.where(o > 0, _exp(o * o * fall), 1)
            elif METHOD == "linear":
                score *= tl.where(o > limit, 1 - o, 1)
            else:
                score *= tl.where(o > limit, tl.zeros_like(o), 1)
            score = tl.where((score > least) & (i != last), score, 0)
            tl.store(scores + i, score, mask=i < end)
            place = tl.where(score > best, i, place)
            best = tl.maximum(best, score)
        value = tl.max(best, 0)
        last = tl.min(tl.where(best == value, place, end), 0)
        tl.store(chosen + last, value, mask=value > 0)
        steps = tl.where(value > 0, steps - 1, 0)
        tl.debug_barrier()


def _check(boxes, scores, idxs, sigma, score_threshold, method):
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise RuntimeError(f"boxes: expected shape [N, 4], got {list(boxes.shape)}")
    for name, x in (("scores", scores), ("idxs", idxs)):
        if x is not None and x.shape != boxes.shape[:1]:
            raise RuntimeError(f"{name}: expected shape [{boxes.shape[0]}], got {list(x.shape)}")
    if not score_threshold >= 0:
        raise RuntimeError(f"score_threshold: expected at least 0, got {score_threshold}")
    if not sigma > 0:
        raise RuntimeError(f"sigma: expected greater than 0, got {sigma}")
    if method not in ("linear", "gaussian", "naive"):
        raise RuntimeError(f'method: expected "naive", "linear" or "gaussian", got {method!r}')


def soft_nms(boxes, scores, idxs, iou_threshold, sigma, score_threshold, method):
    _check(boxes, scores, idxs, sigma, score_threshold, method)
    dtype, out_type, n = number_type(boxes, scores), scores.dtype, scores.numel()
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    if not n:
        return scores.new_empty(0, dtype=torch.int64), scores.new_empty(0, dtype=out_type)
    if idxs is None:
        order = torch.arange(n, device=boxes.device)
        ends = torch.full((1,), n, device=boxes.device)
    else:
        ranked, order = idxs.long().sort(stable=True)
        ends = torch.unique_consecutive(ranked, return_counts=True)[1].cumsum(0)
    boxes = boxes[order].contiguous()
    left, chosen = torch.where(boxes.isnan().any(1), 0, scores[order]), torch.zeros_like(scores)
    with on_device_of(boxes):
        _soft_nms_kernel[(ends.numel(),)](
            boxes, left, chosen, ends, round_down(iou_threshold, dtype), -1 / sigma if sigma > 1e-30 else -1e30,
            score_threshold, METHOD=method, BLOCK=_BLOCK, **_LAUNCH,
        )  # fmt: skip
    final = torch.empty_like(chosen).scatter_(0, order, chosen)
    lowered, indices = final.sort(descending=True, stable=True)
    some = lowered > 0
    return indices[some], lowered[some].to(out_type)


def _variant(dtype: str, method: str, note: str) -> Variant:
    types = {"boxes": f"*{dtype}", "scores": f"*{dtype}", "chosen": f"*{dtype}", "ends": "*i64"}
    types |= dict.fromkeys(("iou_threshold", "minus_inverse_sigma", "score_threshold"), "fp64")
    return Variant(_soft_nms_kernel, types, {"METHOD": method, "BLOCK": _BLOCK}, note=note, **_LAUNCH)


_NOTE = "80 classes of 500 boxes, of which all are chosen: 500 steps of some 1000 cycles, 0.3 ms"
VARIANTS = [_variant("fp32", method, _NOTE) for method in ("linear", "gaussian")]
VARIANTS.append(_variant("fp64", "gaussian", "the same in float64"))
