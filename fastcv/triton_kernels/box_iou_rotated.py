"""Intersection over union of every pair of rotated boxes, in float64 as on the CPU.

A program has a tile of pairs. Six numbers of each box, its cosine and sine among them, are computed once before.

Operations: 12 for a pair whose circles do not meet, some 200 for the tiles of others. IoU of 10,000 x 1000: 40 MB,
0.01 ms at 4.3 TB/s, and 1.2e8 operations of float64, as long; 2e9 where each tile has a pair that is near, 0.07 ms.
Reasoned, not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._boxes import INTERPRETED, ROUNDED
from ._launch import Variant, on_device_of
from ._rotated import check, columns, rotated_iou
from ._suppression import load_positions

_ROWS, _COLUMNS = (64, 128) if INTERPRETED else (4, 32)  # a pair for each thread


@triton.jit
def _box_iou_rotated_kernel(boxes1, boxes2, out, n, m, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    across = tl.cdiv(m, COLUMNS)
    i = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    value = rotated_iou(load_positions(boxes1, n, i, i < n, 6), load_positions(boxes2, m, j, j < m, 6))
    tl.store(out + i * m + j, value.to(out.dtype.element_ty), mask=(i < n) & (j < m))


def box_iou_rotated(boxes1, boxes2, wide):
    check("boxes1", boxes1), check("boxes2", boxes2)
    n, m = boxes1.shape[0], boxes2.shape[0]
    out = boxes1.new_empty((n, m), dtype=torch.float64 if wide else torch.float32)
    if out.numel():
        with on_device_of(boxes1):
            _box_iou_rotated_kernel[(triton.cdiv(n, _ROWS) * triton.cdiv(m, _COLUMNS),)](
                columns(boxes1), columns(boxes2), out, n, m, ROWS=_ROWS, COLUMNS=_COLUMNS, **ROUNDED
            )
    return out


VARIANTS = [
    Variant(
        _box_iou_rotated_kernel,
        {"boxes1": "*fp64", "boxes2": "*fp64", "out": "*fp32", "n": "i32", "m": "i32"},
        {"ROWS": 4, "COLUMNS": 32},
        note="10,000 x 1000 pairs: 40 MB, 0.01 ms, and as long for 12 operations each",
        **ROUNDED,
    )
]
