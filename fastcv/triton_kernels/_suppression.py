"""Greedy suppression, of any kind of boxes: what nms and its like share.

Boxes are sorted by score (and class) into rows: an image, or one class of it. A segment is what may suppress each
other: a row, or its boxes of one class. Rows are cut into blocks of 512 positions, and a segment's r-th is resolved in
round r:
    masks    every box, all at once: which better boxes of its own block and segment it overlaps too much, by bits
    resolve  each segment in its r-th block. A box is removed when one of those is kept, and kept when all of
             them are removed; this is asked for all boxes at once until nothing changes, as often as the longest chain
             of boxes each of which hangs on the one before, mostly a few times. Kept boxes of the segment that goes on
             in the next block are listed
    sweep    the boxes of a segment's later blocks are compared with those listed
So boxes are compared with kept ones only, memory grows with the number of boxes (about 110 bytes for each in float32,
and what sorting takes) and nothing is copied to the host: the number of rounds follows from the length of a row.

Operations: N^2 / 2 comparisons at most, of about 20 instructions, and 256 N for the masks. Floor for 100,000 boxes of
which a tenth is kept: 1e9 comparisons, 0.7 ms at 30e12 instructions a second; the launches, 390, take longer: Triton's
launcher needs some 10 us for each. Reasoned, not measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._boxes import INTERPRETED, ROUNDED, diou, iou
from ._launch import Variant, on_device_of
from ._rotated import rotated_iou

BLOCK = 512
_PREPARED = 512  # positions of a program
_MASKS_WARPS, _RESOLVE_WARPS = 8, 16


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Positions of a program that makes masks, of one that sweeps, and better boxes that it takes at once: what fits in
    registers."""

    masked: int
    swept: int
    kept: int


_GPU_TILES = {"iou": _Tiles(64, 128, 8), "diou": _Tiles(64, 128, 8), "rotated": _Tiles(8, 32, 4)}
# The interpreter's time goes by the number of operations.
_TILES = dict.fromkeys(_GPU_TILES, _Tiles(512, 512, 64)) if INTERPRETED else _GPU_TILES


@dataclasses.dataclass(frozen=True)
class Criterion:
    kind: str
    """``"iou"``, ``"diou"`` or ``"rotated"`` (their IoU): what must not be greater than the threshold."""
    threshold: float
    """A number of the boxes' type."""


@triton.jit
def load_positions(box, size, at, mask, FIELDS: tl.constexpr = 4):
    """Boxes at these positions, of numbers side by side; where there is none NaN, which overlaps nothing."""
    size, nan = tl.full((), size, tl.int64), float("nan")
    a, b = tl.load(box + at, mask=mask, other=nan), tl.load(box + (at + size), mask=mask, other=nan)
    c, d = tl.load(box + (at + 2 * size), mask=mask, other=nan), tl.load(box + (at + 3 * size), mask=mask, other=nan)
    if FIELDS == 4:
        return a, b, c, d
    else:
        e = tl.load(box + (at + 4 * size), mask=mask, other=nan)
        return a, b, c, d, e, tl.load(box + (at + 5 * size), mask=mask, other=nan)


@triton.jit
def _overlaps(a, b, threshold, KIND: tl.constexpr):
    if KIND == "rotated":
        overlap = rotated_iou(a, b)
    elif KIND == "diou":
        overlap = diou(a, b)
    else:
        overlap = iou(a, b)
    return overlap > tl.full((), threshold, tl.float64).to(overlap.dtype)


@triton.jit
def _prepare_kernel(
    boxes, scores, order, box, removed, length, classes, size, score_threshold: tl.float64, ALL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Each position's box, and whether it takes no part: what holds a NaN or has too low a score."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here, row = i < size, i // length
    index = tl.load(order + i, mask=here, other=0)
    score = tl.load(scores + row * length + index, mask=here, other=0)
    removes, size = score != score, tl.full((), size, tl.int64)
    if not ALL:
        removes |= ~(score > tl.full((), score_threshold, tl.float64).to(score.dtype))
    for k in tl.static_range(4):
        side = tl.load(boxes + (row // classes * length + index) * 4 + k, mask=here, other=0)
        removes |= side != side
        tl.store(box + k * size + i, side, mask=here)
    tl.store(removed + i, removes.to(tl.int8), mask=here)


@triton.jit
def _masks_kernel(
    box, start, masks, length, size, threshold: tl.float64, KIND: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Bit k of word w of a position: it overlaps position 32 w + k of its block, which is better. Zero before."""
    parts = tl.cdiv(length, ROWS)
    offset = (tl.program_id(0) // parts).to(tl.int64) * length
    first = tl.program_id(0) % parts * ROWS
    p, bit = first + tl.arange(0, ROWS)[:, None], tl.arange(0, 32)[None, :]
    here = p < length
    FIELDS: tl.constexpr = 6 if KIND == "rotated" else 4
    mine = load_positions(box, size, offset + p, here, FIELDS)
    if IDS:
        begin = tl.load(start + offset + p, mask=here, other=0)
    block = first // BLOCK * BLOCK
    for w in range(0, tl.cdiv(tl.minimum(first + ROWS, length) - block, 32)):
        k = block + w * 32 + bit
        better = here & (k < p)
        if IDS:
            better &= k >= begin
        hits = _overlaps(load_positions(box, size, offset + k, k < length, FIELDS), mine, threshold, KIND) & better
        word = tl.sum(hits.to(tl.int32) << bit, 1, keep_dims=True)
        tl.store(masks + tl.full((), size, tl.int64) * w + offset + p, word, mask=here)


@triton.jit
def _words(flags, BLOCK: tl.constexpr):
    """Zeros and ones [BLOCK] as bits [1, BLOCK / 32]."""
    bits = tl.reshape(flags, (BLOCK // 32, 32)) << tl.arange(0, 32)[None, :]
    return tl.sum(bits, 1)[None, :]


@triton.jit(do_not_specialize=["round"])
def _resolve_kernel(
    box, start, removed, masks, kept, counts, length, size, round, FIELDS: tl.constexpr, IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Segments in their block ``round``. Of that which goes on, kept ones are listed from the block's place on."""
    blocks, step = tl.cdiv(length, BLOCK), tl.program_id(0)
    row, block = step, round
    if IDS:
        row, block = step // blocks, step % blocks
    offset, p = row.to(tl.int64) * length, block * BLOCK + tl.arange(0, BLOCK)
    here = p < length
    goes_on = here
    if IDS:
        begin = tl.load(start + offset + p, mask=here, other=0)
        last = tl.load(start + offset + tl.minimum(block * BLOCK + BLOCK, length) - 1)
        here &= block - begin // BLOCK == round
        goes_on = here & (begin == last)
    word = tl.arange(0, BLOCK // 32).to(tl.int64)[None, :] * size
    mask = tl.load(masks + word + (offset + p)[:, None], mask=here[:, None], other=0)
    is_open = (tl.load(removed + offset + p, mask=here, other=1) == 0).to(tl.int32)
    is_kept = tl.zeros((BLOCK,), tl.int32)
    while tl.max(is_open, 0) > 0:
        better_kept = tl.max(((mask & _words(is_kept, BLOCK)) != 0).to(tl.int32), 1)
        better_open = tl.max(((mask & _words(is_open, BLOCK)) != 0).to(tl.int32), 1)
        decided = is_open & (better_kept | (1 - better_open))
        is_kept |= decided & (1 - better_kept)
        is_open -= decided
    tl.store(removed + offset + p, (1 - is_kept).to(tl.int8), mask=here)
    listed = goes_on.to(tl.int32) & is_kept
    to = offset + block * BLOCK + tl.cumsum(listed, 0) - 1
    size = tl.full((), size, tl.int64)
    for k in tl.static_range(FIELDS):
        number = tl.load(box + k * size + offset + p, mask=listed != 0)
        tl.store(kept + k * size + to, number, mask=listed != 0)
    tl.store(counts + row.to(tl.int64) * blocks + block, tl.sum(listed, 0), mask=tl.max(goes_on.to(tl.int32), 0) > 0)


@triton.jit(do_not_specialize=["round"])
def _sweep_kernel(
    box, start, removed, kept, counts, length, size, round, threshold: tl.float64, KIND: tl.constexpr,
    IDS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Positions that belong to a later block of a segment than ``round``: they are all of the segment of their block's
    first position, as others begin in the block."""
    parts = tl.cdiv(length - (round + 1) * BLOCK, ROWS)
    row = (tl.program_id(0) // parts).to(tl.int64)
    first = (round + 1) * BLOCK + tl.program_id(0) % parts * ROWS
    offset, p = row * length, first + tl.arange(0, ROWS)[:, None]
    source, asks = round, p < length
    if IDS:
        segment = tl.load(start + offset + first // BLOCK * BLOCK)
        source = segment // BLOCK + round
        asks &= (source < first // BLOCK) & (tl.load(start + offset + p, mask=asks, other=-1) == segment)
    asks &= tl.load(removed + offset + p, mask=asks, other=1) == 0
    count = 0
    if tl.max(asks.to(tl.int32)) > 0:
        count = tl.load(counts + row * tl.cdiv(length, BLOCK) + source)
    if count > 0:
        FIELDS: tl.constexpr = 6 if KIND == "rotated" else 4
        mine = load_positions(box, size, offset + p, asks, FIELDS)
        hits = tl.zeros((ROWS, CHUNK), tl.int32)
        for k in range(0, count, CHUNK):
            better = k + tl.arange(0, CHUNK)[None, :]
            best = load_positions(kept, size, offset + source * BLOCK + better, better < count, FIELDS)
            hits |= _overlaps(best, mine, threshold, KIND).to(tl.int32)
        hit = tl.max(hits, 1, keep_dims=True) > 0
        tl.store(removed + offset + p, tl.full((ROWS, 1), 1, tl.int8), mask=hit & asks)


# ---- on the host ----------------------------------------------------------------------------------------------------


def check_length(length: int) -> None:
    if length >= 2**31 - BLOCK:
        raise RuntimeError(f"boxes: expected fewer than 2^31 a row, got {length}")


def grouped(order: Tensor, ids: Tensor) -> Tensor:
    """``order``, sorted again by ids, within rows."""
    return order.gather(1, ids.gather(1, order).sort(dim=1, stable=True).indices)


def prepare(
    boxes: Tensor, scores: Tensor, order: Tensor, classes: int, score_threshold: float = float("-inf")
) -> tuple[Tensor, Tensor]:
    """Boxes ``[4, rows * length]`` by position, side by side, and int8 ``[rows, length]``: 1 where they take no part.

    ``boxes`` ``[rows / classes, length, 4]`` and ``scores`` ``[rows, length]`` are contiguous, of one type, not empty.
    """
    rows, length = scores.shape
    check_length(length)
    size = rows * length
    box, removed = scores.new_empty((4, size)), scores.new_empty((rows, length), dtype=torch.int8)
    with on_device_of(scores):
        _prepare_kernel[(triton.cdiv(size, _PREPARED),)](
            boxes, scores, order, box, removed, length, classes, size, score_threshold,
            ALL=score_threshold == float("-inf"), BLOCK=_PREPARED,
        )  # fmt: skip
    return box, removed


def segment_begins(ids: Tensor, order: Tensor) -> Tensor:
    """int32 ``[rows, length]``: where the segment of each position of ``order``, which is sorted by ids, begins."""
    ranked = ids.gather(1, order)
    return torch.searchsorted(ranked, ranked, out_int32=True)


def suppress(
    box: Tensor, removed: Tensor, order: Tensor, ids: Tensor | None, criterion: Criterion, reads_longest: bool = False
) -> None:
    """Writes 1 in ``removed``, int8 ``[rows, length]``, at the positions of ``order`` that are not kept.

    ``box`` and ``removed`` as :func:`prepare` makes them; ``reads_longest``: rounds go by the longest segment, for
    which the host waits, instead of by the rows' length.
    """
    rows, length = order.shape
    check_length(length)
    size, blocks, tiles = rows * length, triton.cdiv(length, BLOCK), _TILES[criterion.kind]
    kept, masks = torch.empty_like(box), removed.new_zeros((BLOCK // 32, size), dtype=torch.int32)
    counts = masks.new_empty((rows, blocks))
    start, rounds = removed, blocks
    if ids is not None:
        start = segment_begins(ids, order)
        if reads_longest and blocks > 1:
            last = torch.arange(length, device=start.device) // BLOCK
            rounds = int((last - start // BLOCK).max()) + 1
    shared = {"IDS": ids is not None, "BLOCK": BLOCK}
    limit = {"threshold": criterion.threshold, "KIND": criterion.kind}
    with on_device_of(box):
        _masks_kernel[(rows * triton.cdiv(length, tiles.masked),)](
            box, start, masks, length, size, **limit, **shared, ROWS=tiles.masked, num_warps=_MASKS_WARPS, **ROUNDED
        )
        for round in range(rounds):
            _resolve_kernel[(rows * (blocks if ids is not None else 1),)](
                box, start, removed, masks, kept, counts, length, size, round, FIELDS=box.shape[0], **shared,
                num_warps=_RESOLVE_WARPS,
            )  # fmt: skip
            if parts := triton.cdiv(max(length - (round + 1) * BLOCK, 0), tiles.swept):
                _sweep_kernel[(rows * parts,)](
                    box, start, removed, kept, counts, length, size, round, **limit, **shared, ROWS=tiles.swept,
                    CHUNK=tiles.kept, **ROUNDED,
                )  # fmt: skip


def kept_indices(prepare: Callable, scores: Tensor, ids: Tensor | None, criterion: Criterion) -> Tensor:
    """Indices of the boxes kept, best first. ``prepare(order)``: ``box`` and ``removed`` of :func:`suppress`."""
    scores, ids = scores[None], None if ids is None else ids.long()[None]
    ranked = scores.sort(dim=1, descending=True, stable=True).indices
    if not ranked.numel():
        return ranked[0]
    order = ranked if ids is None else grouped(ranked, ids)
    box, removed = prepare(order[0])
    suppress(box, removed, order, ids, criterion, reads_longest=True)
    if ids is not None:
        removed = torch.empty_like(removed).scatter_(1, order, removed).gather(1, ranked)
    return ranked[removed == 0]


def variants(dtype: str, kind: str, ids: bool, note: str) -> list[Variant]:
    types = dict.fromkeys(("length", "classes", "size", "round"), "i32") | dict.fromkeys(("box", "kept"), f"*{dtype}")
    types |= {"boxes": f"*{dtype}", "scores": f"*{dtype}", "order": "*i64", "start": "*i32", "removed": "*i8"}
    types |= {"masks": "*i32", "counts": "*i32", "threshold": "fp64", "score_threshold": "fp64"}
    shared, tiles = {"IDS": ids, "BLOCK": BLOCK}, _GPU_TILES[kind]
    masks = {**shared, "KIND": kind, "ROWS": tiles.masked}
    sweep = {**shared, "KIND": kind, "ROWS": tiles.swept, "CHUNK": tiles.kept}
    fields = {"FIELDS": 6 if kind == "rotated" else 4}
    return [
        Variant(_prepare_kernel, types, {"classes": 1, "ALL": True, "BLOCK": _PREPARED}, note=note),
        Variant(_masks_kernel, types, masks, num_warps=_MASKS_WARPS, note=note, **ROUNDED),
        Variant(_resolve_kernel, types, shared | fields, num_warps=_RESOLVE_WARPS, note=note),
        Variant(_sweep_kernel, types, sweep, note=note, **ROUNDED),
    ]
