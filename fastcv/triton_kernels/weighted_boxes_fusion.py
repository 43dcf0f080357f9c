"""Weighted boxes fusion on the device, in float64 as on the CPU: a program for each label.

Which cluster a box joins depends on where those before it have moved the clusters, so that the boxes of a label follow
each other: each is compared with all clusters, the program finds the best, and its sums and mean are moved. Clusters
lie in global memory. All sums are those of the CPU in its order, and no multiply-adds are fused. Weighting, sorting and
the scores of clusters are torch's.

Bytes: about 200 a box. Operations: 25 for each box and each cluster of its label. Floor for 80 labels of 100 boxes:
their 80 * 100 * 12 comparisons are nothing; but boxes follow each other, and each waits for loads, reductions and a
division, some 2000 cycles: 0.1 ms, for any number of labels up to that of the multiprocessors. Reasoned, not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._boxes import ROUNDED, iou, load_corners
from ._launch import Variant, on_device_of
from ._suppression import grouped

_BLOCK = 256
_CONF_TYPES = ("avg", "max", "box_and_model_avg", "absent_model_aware_avg")


@triton.jit
def _fuse_kernel(
    boxes, scores, weights, ends, means, coordinates, score_sums, weight_sums, opener, cluster, threshold: tl.float64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Boxes by label and score; -1: takes no part. The clusters of a label have the places of its boxes: their means
    and sums, and the box that opened each. cluster: the place of that which a box joins."""
    MOST: tl.constexpr = 2**62
    label, side = tl.program_id(0), tl.arange(0, 4)
    i, end = tl.load(ends + label - 1, mask=label > 0, other=0), tl.load(ends + label)
    first, count = i, i - i
    score = tl.load(scores + i)
    while (i < end) & (score >= 0):
        mine = load_corners(boxes, i, i < end)
        best = tl.full((BLOCK,), threshold, tl.float64)
        place = tl.full((BLOCK,), MOST, tl.int64)
        for tile in range(0, count, BLOCK):
            k = tile + tl.arange(0, BLOCK)
            o = iou(load_corners(means, first + k, k < count), mine)
            place = tl.where(o > best, k, place)
            best = tl.where(o > best, o, best)
        match = tl.min(tl.where(best == tl.max(best, 0), place, MOST), 0)
        joins, opens = match < MOST, match >= MOST
        at = first + tl.where(joins, match, count)
        box, corner = tl.load(boxes + i * 4 + side), at * 4 + side
        total = tl.load(coordinates + corner, mask=joins & (side >= 0), other=0) + score * box
        mean = tl.load(means + corner, mask=joins & (side >= 0), other=0)
        sum = tl.load(score_sums + at, mask=joins, other=0) + score
        weight = tl.load(weight_sums + at, mask=joins, other=0) + tl.load(weights + i)
        tl.debug_barrier()  # all have read what is written now
        tl.store(coordinates + corner, total)
        # Of scores of 0 only the first box stands for all.
        mean = tl.where(sum > 0, total / tl.where(sum > 0, sum, 1), mean)
        tl.store(means + corner, tl.where(joins, mean, box))
        tl.store(score_sums + at, sum)
        tl.store(weight_sums + at, weight)
        tl.store(opener + at, i, mask=opens)
        tl.store(cluster + i, at)
        count = tl.where(joins, count, count + 1)
        i += 1
        score = tl.load(scores + i, mask=i < end, other=-1)
        tl.debug_barrier()


def _check(boxes, scores, labels, counts, weights, conf_type):
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise RuntimeError(f"boxes: expected shape [N, 4], got {list(boxes.shape)}")
    for name, x in (("scores", scores), ("labels", labels)):
        if x.shape != boxes.shape[:1]:
            raise RuntimeError(f"{name}: expected shape [{boxes.shape[0]}], got {list(x.shape)}")
    if min(counts, default=0) < 0 or sum(counts) != boxes.shape[0]:
        raise RuntimeError(f"counts: expected numbers of boxes that sum to {boxes.shape[0]}, got {list(counts)}")
    if len(weights) != len(counts):
        raise RuntimeError(f"weights: expected {len(counts)} weights, got {len(weights)}")
    if conf_type not in _CONF_TYPES:
        raise RuntimeError(f"conf_type: expected one of {', '.join(_CONF_TYPES)}, got {conf_type!r}")


def weighted_boxes_fusion(
    boxes, scores, labels, counts, weights, iou_threshold, skip_threshold, conf_type, allows_overflow
):
    _check(boxes, scores, labels, counts, weights, conf_type)
    if not scores.numel():
        return boxes.new_empty((0, 4)), scores.new_empty(0), labels.new_empty(0)
    half = scores.dtype in (torch.float16, torch.bfloat16)
    takes_part = (scores.float() if half else scores) >= skip_threshold
    wide, weight = boxes.double(), torch.tensor(weights, dtype=torch.float64, device=boxes.device)
    models = torch.repeat_interleave(torch.tensor(counts, device=boxes.device))
    weighted = scores.double() * weight[models]
    sides = wide[:, 2:] - wide[:, :2]
    area = sides.prod(1)
    takes_part &= (sides > 0).all(1) & (area > 0) & area.isfinite() & (weighted >= 0) & weighted.isfinite()
    weighted = torch.where(takes_part, weighted, -1.0)
    order = grouped(weighted[None].sort(dim=1, descending=True, stable=True).indices, labels.long()[None])[0]
    row, mean, score = _fuse(
        wide[order].contiguous(), weighted[order], models[order], labels[order], order, weight, iou_threshold,
        conf_type, allows_overflow,
    )  # fmt: skip
    return mean.to(boxes.dtype), score.to(scores.dtype), labels[row]


def _fuse(boxes, scores, models, labels, order, weight, iou_threshold, conf_type, allows_overflow):
    """Of each cluster the row of its first box, its mean box and its score, best first."""
    ends = torch.unique_consecutive(labels, return_counts=True)[1].cumsum(0)
    means, coordinates = torch.empty_like(boxes), torch.empty_like(boxes)
    score_sums, weight_sums = torch.empty_like(scores), torch.empty_like(scores)
    opener, cluster = torch.empty_like(order), torch.empty_like(order)
    with on_device_of(boxes):
        _fuse_kernel[(ends.numel(),)](
            boxes, scores, weight[models], ends, means, coordinates, score_sums, weight_sums, opener, cluster,
            iou_threshold, BLOCK=_BLOCK, **ROUNDED,
        )  # fmt: skip
    takes_part = scores >= 0
    at, size = cluster[takes_part].unique(return_counts=True)  # ascending
    row, by_row = order[opener[at]].sort()
    at, size = at[by_row], size[by_row]
    present = torch.zeros_like(scores)
    for model, its in enumerate(weight):  # in this order, one after the other
        has = torch.zeros_like(takes_part)
        has[cluster[takes_part & (models == model)]] = True
        present += torch.where(has, its, 0)
    sums, total, present = score_sums[at], weight_sums[at], present[at]
    if conf_type == "max":
        score = scores[opener[at]] / weight.max()
    elif conf_type == "box_and_model_avg":
        score = torch.where(total > 0, sums / total * present / weight.sum(), 0.0)
    elif conf_type == "absent_model_aware_avg":
        score = sums / (total + (weight.sum() - present))
    else:
        score = sums / size * (size if allows_overflow else size.clamp(max=len(weight))) / weight.sum()
    score, best = score.sort(descending=True, stable=True)
    some = score >= 0
    best = best[some]
    return row[best], means[at[best]], score[some]


VARIANTS = [
    Variant(
        _fuse_kernel,
        dict.fromkeys(("boxes", "scores", "weights", "means", "coordinates", "score_sums", "weight_sums"), "*fp64")
        | dict.fromkeys(("ends", "opener", "cluster"), "*i64")
        | {"threshold": "fp64"},
        {"BLOCK": _BLOCK},
        note="80 labels of 100 boxes: 100 steps of some 2000 cycles, 0.1 ms",
        **ROUNDED,
    )
]
