"""Intersection over union of rotated boxes.

Two boxes are compared in the frame of the first, where it is the rectangle |x| <= W, |y| <= H and
the second is a convex polygon with four edges. A vertical line meets the intersection in the part
of it between the polygon's edges, clamped to [-H, H], so by Green's theorem

    area = - sum over edges of the integral of clamp(y, -H, H) dx, over the edge within |x| <= W.

On each edge the integrand is linear in three pieces, which gives a closed form. No intersection
points are collected or sorted, so nothing degenerates when corners or edges coincide, and the
area is a continuous function of the boxes. Sources: Green's theorem; Liang and Barsky, "A new
concept and method for line clipping", ACM Transactions on Graphics 3(1), 1984, for the clamping.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Pairs handled at once: few enough for a processor's cache, or to use about 100 MB elsewhere.
_PAIRS_CPU, _PAIRS = 1 << 16, 1 << 18


def in_float(boxes1: Tensor, boxes2: Tensor, wide: bool) -> Tensor:
    """The operator: float64 or float32, without derivatives."""
    with torch.no_grad():
        return box_iou_rotated(boxes1, boxes2, torch.float64 if wide else torch.float32)


def box_iou_rotated(boxes1: Tensor, boxes2: Tensor, dtype: torch.dtype) -> Tensor:
    """``[N, 5]`` and ``[M, 5]`` in cxcywhr (degrees) give ``[N, M]`` of type ``dtype``."""
    n, m = boxes1.shape[0], boxes2.shape[0]
    if torch.compiler.is_compiling():
        # Shapes may not depend on values here, and a compiler fuses the intermediates away.
        return _iou_of_pairs(boxes1[:, None], boxes2[None]).to(dtype)
    rows = max(1, (_PAIRS_CPU if boxes1.device.type == "cpu" else _PAIRS) // max(m, 1))
    # At least one part, so that the empty result has a shape and a graph too.
    starts = range(0, max(n, 1), rows)
    return torch.cat([_iou_of_rows(boxes1[i : i + rows], boxes2).to(dtype) for i in starts])


def _iou_of_rows(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Only pairs whose circumscribed circles meet are computed; the others are zero."""
    with torch.no_grad():
        dx = boxes1[:, None, 0] - boxes2[None, :, 0]
        dy = boxes1[:, None, 1] - boxes2[None, :, 1]
        reach = _radius(boxes1)[:, None] + _radius(boxes2)[None]
        # Negated, so that a NaN is computed and shows in the result; 1.01 covers rounding.
        near = ~(dx * dx + dy * dy > reach * reach * 1.01)
        i, j = near.nonzero(as_tuple=True)
    iou = boxes1.new_zeros((boxes1.shape[0], boxes2.shape[0]))
    return iou.index_put((i, j), _iou_of_pairs(boxes1[i], boxes2[j]))


def _radius(boxes: Tensor) -> Tensor:
    return torch.hypot(boxes[:, 2], boxes[:, 3]) / 2


def _iou_of_pairs(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU of boxes ``[..., 5]`` which broadcast against each other."""
    area1, area2 = boxes1[..., 2] * boxes1[..., 3], boxes2[..., 2] * boxes2[..., 3]
    overlap = _intersection(boxes1, boxes2)
    overlap = torch.where(overlap <= area1 * 1e-14, 0, overlap)  # of boxes apart it is what rounding leaves
    overlap = torch.minimum(overlap, torch.minimum(area1, area2))
    union = area1 + area2 - overlap
    # An infinite box covers any other infinitely little.
    nothing = (area1 <= 0) | (area2 <= 0) | (area1 + area2).isinf()
    return torch.where(nothing, 0, overlap / torch.where(nothing, 1, union))


def _intersection(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    half_w, half_h = boxes1[..., 2].abs() / 2, boxes1[..., 3].abs() / 2
    x, y = _corners_in_frame(boxes1, boxes2)  # [..., 4]
    return -_edge_integrals(x, y, half_w[..., None], half_h[..., None]).sum(dim=-1)


def _corners_in_frame(frame: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Corners of ``boxes`` relative to the centre and the axes of ``frame``, counter-clockwise."""
    turn = torch.deg2rad(frame[..., 4])
    cos, sin = torch.cos(turn), torch.sin(turn)
    dx, dy = boxes[..., 0] - frame[..., 0], boxes[..., 1] - frame[..., 1]
    cx, cy = dx * cos - dy * sin, dx * sin + dy * cos
    # From the difference of the angles, so that equal angles give exactly parallel edges.
    turn = torch.deg2rad(boxes[..., 4] - frame[..., 4])
    cos, sin = torch.cos(turn), torch.sin(turn)
    half_w, half_h = boxes[..., 2].abs() / 2, boxes[..., 3].abs() / 2
    wx, wy, hx, hy = half_w * cos, -half_w * sin, half_h * sin, half_h * cos
    x = torch.stack((cx - wx - hx, cx + wx - hx, cx + wx + hx, cx - wx + hx), dim=-1)
    y = torch.stack((cy - wy - hy, cy + wy - hy, cy + wy + hy, cy - wy + hy), dim=-1)
    return x, y


def _edge_integrals(xa: Tensor, ya: Tensor, half_w: Tensor, half_h: Tensor) -> Tensor:
    """Integral of clamp(y, -half_h, half_h) dx along each edge of a polygon ``[..., K]``."""
    xb, yb = xa.roll(-1, dims=-1), ya.roll(-1, dims=-1)
    start, end = _clamp(xa, half_w), _clamp(xb, half_w)
    width = end - start
    # Where the width is zero the integral is zero whatever the heights, but they must be finite,
    # and for a vertical edge they must be those of its ends: the derivatives need them.
    slope = (yb - ya) / torch.where(width == 0, 1, xb - xa)
    ya, yb = ya + (start - xa) * slope, yb - (xb - end) * slope
    low, high = _clamp(ya, half_h), _clamp(yb, half_h)
    # The mean of clamp(y) over y from ya to yb: low and high are taken on the parts of the way
    # outside the band, (low - ya) / (yb - ya) and (yb - high) / (yb - ya).
    rise, total = high - low, low + high
    uneven = (total - ya - yb) / torch.where(rise == 0, 1, yb - ya)
    return width * (total - rise * uneven) / 2


def _clamp(value: Tensor, limit: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(value, limit), -limit)
