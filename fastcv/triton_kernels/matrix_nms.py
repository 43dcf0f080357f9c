"""Matrix NMS on the device: two passes over all pairs of a box and a better one (``csrc/matrix_nms`` has the formulas).

The boxes of each image are sorted by score and class into a row of segments, so that better boxes of the class of a
position are those between the begin of its segment and itself. A program takes some positions, and every so many-th
chunk of those before them; programs that share positions meet in an atomic maximum or minimum of bits, whose result
does not depend on their order. Between the passes nothing is kept but a number for each box.

Bytes: 28 a box and what sorting takes, never a matrix. Operations: N^2 / 2 pairs a pass, about 25 each. Floor for
10,000 boxes of one class: 2.5e9 operations, 0.04 ms at 60 TFLOP/s; for 1000 boxes the launches. Reasoned, not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._boxes import INTERPRETED, ROUNDED, divide, iou, number_type
from ._launch import Variant, on_device_of
from ._suppression import grouped, load_positions, prepare, segment_begins

# Positions of a program, and better boxes that it takes at once.
_ROWS, _CHUNK = (512, 128) if INTERPRETED else (128, 8)
_PROGRAMS = 2 if INTERPRETED else 4096  # enough for any device: about 30 for each multiprocessor of an H200


@triton.jit
def _matrix_nms_kernel(
    box, start, overlap, result, length, size, PASS: tl.constexpr, IDS: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """result: bits by position. Pass "overlap": the greatest IoU with a better box, zero before. "gaussian": the
    greatest difference of squares, of an IoU and of the better box's own overlap, zero before. "linear": the least
    factor, one before."""
    NUMBER: tl.constexpr = box.dtype.element_ty
    tiles = tl.cdiv(length, ROWS)
    offset, first = (tl.program_id(0) // tiles).to(tl.int64) * length, tl.program_id(0) % tiles * ROWS
    p = first + tl.arange(0, ROWS)[:, None]
    here, begin = p < length, 0
    mine = load_positions(box, size, offset + p, here)
    if IDS:
        begin = tl.load(start + offset + p, mask=here, other=0)
        lowest = tl.load(start + offset + first) // CHUNK * CHUNK
    else:
        lowest = 0
    best = tl.full((ROWS, CHUNK), 1 if PASS == "linear" else 0, NUMBER)
    for other in range(lowest + tl.program_id(1) * CHUNK, tl.minimum(first + ROWS, length), tl.num_programs(1) * CHUNK):
        k = other + tl.arange(0, CHUNK)[None, :]
        value = iou(load_positions(box, size, offset + k, k < length), mine)
        # Comparisons are false for what is NaN: a divisor of 0 makes infinity or NaN, which has no say.
        if PASS == "linear":
            covered = tl.load(overlap + offset + k, mask=k < length, other=0)
            value = divide(1 - value, 1 - covered)
            counts = value < best
        elif PASS == "gaussian":
            covered = tl.load(overlap + offset + k, mask=k < length, other=0)
            value = value * value - covered * covered
            counts = value > best
        else:
            counts = value > best
        best = tl.where(here & (k >= begin) & (k < p) & counts, value, best)
    BITS: tl.constexpr = result.dtype.element_ty
    if PASS == "linear":
        least = tl.maximum(tl.min(best, 1, keep_dims=True), 0)
        tl.atomic_min(result + offset + p, least.to(BITS, bitcast=True), mask=here & (least < 1), sem="relaxed")
    else:
        most = tl.max(best, 1, keep_dims=True)
        tl.atomic_max(result + offset + p, most.to(BITS, bitcast=True), mask=here & (most > 0), sem="relaxed")


def matrix_nms(boxes, scores, idxs, sigma, linear):
    if boxes.dim() != 3 or boxes.shape[2] != 4:
        raise RuntimeError(f"boxes: expected shape [B, N, 4], got {list(boxes.shape)}")
    for name, x in (("scores", scores), ("idxs", idxs)):
        if x is not None and x.shape != boxes.shape[:2]:
            raise RuntimeError(f"{name}: expected shape {list(boxes.shape[:2])}, got {list(x.shape)}")
    if not sigma > 0:
        raise RuntimeError(f"sigma: expected greater than 0, got {sigma}")
    if not scores.numel():
        return torch.empty_like(scores, memory_format=torch.contiguous_format)
    dtype, out_type = number_type(boxes, scores), scores.dtype
    boxes, scores = boxes.to(dtype).contiguous(), scores.to(dtype).contiguous()
    order, start = scores.sort(dim=1, descending=True, stable=True).indices, None
    if idxs is not None:
        order = grouped(order, idxs.long())
        start = segment_begins(idxs.long(), order)
    box, removed = prepare(boxes, scores, order, 1)
    removed = removed != 0
    box.masked_fill_(removed.view(-1), float("nan"))
    overlap = torch.zeros_like(scores)
    result = torch.ones_like(scores) if linear else torch.zeros_like(scores)
    _run(box, start, overlap, overlap, "overlap")
    _run(box, start, overlap, result, "linear" if linear else "gaussian")
    decay = result if linear else torch.exp(result * -sigma)
    # No product with 0: the score may be infinite.
    lowered = torch.where((decay > 0) & ~removed, scores.gather(1, order) * decay, 0.0)
    return torch.empty_like(scores).scatter_(1, order, lowered).to(out_type)


def _run(box, start, overlap, result, kind):
    rows, length = result.shape
    programs = rows * triton.cdiv(length, _ROWS)
    parts = max(min(_PROGRAMS // programs, triton.cdiv(length, 8 * _CHUNK)), 1)
    bits = result.view(torch.int64 if result.dtype == torch.float64 else torch.int32)
    with on_device_of(box):
        _matrix_nms_kernel[(programs, parts)](
            box, start if start is not None else bits, overlap, bits, length, rows * length, PASS=kind,
            IDS=start is not None, ROWS=_ROWS, CHUNK=_CHUNK, **ROUNDED,
        )  # fmt: skip


def _variant(dtype: str, bits: str, kind: str, note: str) -> Variant:
    types = {"box": f"*{dtype}", "start": "*i32", "overlap": f"*{dtype}", "result": f"*{bits}"}
    types |= {"length": "i32", "size": "i32"}
    return Variant(
        _matrix_nms_kernel, types, {"PASS": kind, "IDS": True, "ROWS": 128, "CHUNK": 8}, note=note, **ROUNDED
    )


_NOTE = "10,000 boxes of one class: 5e7 pairs, 0.02 ms"
VARIANTS = [_variant("fp32", "i32", kind, _NOTE) for kind in ("overlap", "linear", "gaussian")]
VARIANTS.append(_variant("fp64", "i64", "linear", "the same in float64: 0.04 ms"))
