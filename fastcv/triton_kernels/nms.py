"""nms, batched_nms and nms_padded on the device (``_suppression.py``), with nothing read by the host in the last.

Moved for 100,000 boxes: sorting apart, some 250 bytes for each, 25 MB or 6 us; comparisons and launches take longer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._boxes import INTERPRETED, number_type, round_down
from ._launch import Variant, on_device_of
from ._suppression import Criterion, grouped, kept_indices, prepare, suppress, variants

_SELECTED = 4096 if INTERPRETED else 1024


@triton.jit
def _select_kernel(
    removed, ranked, ids, indices, labels, counts, length, candidates, limit, IDS: tl.constexpr, BLOCK: tl.constexpr
):
    """The first candidates of an image that were kept, in the order of their scores; a program for each image."""
    image = tl.program_id(0).to(tl.int64)
    found, first = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    while (first < candidates) & (found < limit):
        p = first + tl.arange(0, BLOCK)
        candidate = tl.load(ranked + image * candidates + p, mask=p < candidates, other=0)
        keeps = (tl.load(removed + image * candidates + candidate, mask=p < candidates, other=1) == 0).to(tl.int32)
        k = found + tl.cumsum(keeps, 0) - 1
        writes = (keeps != 0) & (k < limit)
        label = candidate // length
        if IDS:
            label = tl.load(ids + image * length + candidate, mask=writes, other=0)
        tl.store(indices + image * limit + k, candidate % length, mask=writes)
        tl.store(labels + image * limit + k, label, mask=writes)
        found += tl.sum(keeps, 0)
        first += BLOCK
    tl.store(counts + image, tl.minimum(found, limit))


def _check(boxes: Tensor, scores: Tensor, idxs: Tensor | None) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise RuntimeError(f"boxes: expected shape [N, 4], got {list(boxes.shape)}")
    for name, x in (("scores", scores), ("idxs", idxs)):
        if x is not None and x.shape != boxes.shape[:1]:
            raise RuntimeError(f"{name}: expected shape [{boxes.shape[0]}], got {list(x.shape)}")


def nms(boxes, scores, iou_threshold, diou=False):
    return batched_nms(boxes, scores, None, iou_threshold, diou)


def batched_nms(boxes, scores, idxs, iou_threshold, diou=False):
    _check(boxes, scores, idxs)
    dtype = number_type(boxes, scores)
    boxes, scores = boxes.to(dtype).contiguous(), scores.to(dtype)[None].contiguous()
    criterion = Criterion("diou" if diou else "iou", round_down(iou_threshold, dtype))
    return kept_indices(lambda order: prepare(boxes, scores, order, 1), scores[0], idxs, criterion)


def _check_padded(boxes: Tensor, scores: Tensor, idxs: Tensor | None, max_output: int) -> None:
    if boxes.dim() != 3 or boxes.shape[2] != 4:
        raise RuntimeError(f"boxes: expected shape [B, N, 4], got {list(boxes.shape)}")
    images, n = boxes.shape[:2]
    if scores.dim() not in (2, 3) or (scores.shape[0], scores.shape[-1]) != (images, n):
        raise RuntimeError(f"scores: expected shape [{images}, {n}] or [{images}, C, {n}], got {list(scores.shape)}")
    if idxs is not None and (scores.dim() != 2 or idxs.shape != scores.shape):
        raise RuntimeError(
            f"idxs: expected shape [{images}, {n}], with scores of the same shape, got {list(idxs.shape)} with "
            f"{list(scores.shape)}"
        )
    if max_output < 0:
        raise RuntimeError(f"max_output: expected at least 0, got {max_output}")


def nms_padded(boxes, scores, idxs, iou_threshold, max_output, score_threshold, diou=False):
    _check_padded(boxes, scores, idxs, max_output)
    dtype = number_type(boxes, scores)
    images, n = boxes.shape[:2]
    classes = scores.shape[1] if scores.dim() == 3 else 1
    candidates = classes * n
    indices = torch.full((images, max_output), -1, device=boxes.device)
    labels, counts = torch.full_like(indices, -1), indices.new_zeros(images)
    if not images * candidates:
        return indices, labels, counts
    boxes, scores = boxes.to(dtype).contiguous(), scores.to(dtype).contiguous()
    rows, ids = scores.view(images * classes, n), None if idxs is None else idxs.long().contiguous()
    order = rows.sort(dim=1, descending=True, stable=True).indices
    ranked = order
    if classes > 1:
        ranked = scores.view(images, candidates).sort(dim=1, descending=True, stable=True).indices
    if ids is not None:
        order = grouped(order, ids)
    criterion = Criterion("diou" if diou else "iou", round_down(iou_threshold, dtype))
    box, removed = prepare(boxes, rows, order, classes, score_threshold)
    suppress(box, removed, order, ids, criterion)
    removed = torch.empty_like(removed).scatter_(1, order, removed)
    with on_device_of(boxes):
        _select_kernel[(images,)](
            removed, ranked, ids if ids is not None else ranked, indices, labels, counts, n, candidates, max_output,
            IDS=ids is not None, BLOCK=_SELECTED,
        )  # fmt: skip
    return indices, labels, counts


_SELECT = Variant(
    _select_kernel,
    dict.fromkeys(("ranked", "ids", "indices", "labels", "counts"), "*i64")
    | {"removed": "*i8", "length": "i32", "candidates": "i32", "limit": "i32"},
    {"IDS": True, "BLOCK": 1024},
    note="100 of 8 x 80,000 candidates: 11 MB, 3 us",
)
_NOTE = "100,000 boxes of which a tenth is kept: 1e9 comparisons, 0.7 ms"
VARIANTS = [
    *variants("fp32", "iou", True, f"{_NOTE} if they are of one class"),
    *variants("fp32", "diou", False, "the same, of 30 instructions each: 1 ms")[1::2],
    *variants("fp64", "iou", True, "the same, at a 64th of the speed on cards without much float64")[1::2],
    _SELECT,
]
