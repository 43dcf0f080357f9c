"""Rotated boxes in kernels: six numbers each, in float64, and their intersection over union.

As in ``csrc/box_iou_rotated/box_iou_rotated.h``, which says why: boxes are compared in the frame of the first, by
Green's theorem over the edges of the second. Launched without fused multiply-adds, as ``_boxes.py`` has it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FIELDS = 6


def columns(boxes: Tensor) -> Tensor:
    """float64 ``[N, 5]`` in cxcywhr (degrees) give ``[6, N]``: centre, half sides, cosine and sine.

    Without an area, or with an infinite one, the half sides are 0: such a box overlaps nothing.
    """
    x, y, width, height, angle = boxes.unbind(1)
    area, turn = width * height, torch.deg2rad(angle)
    nothing = (area <= 0) | (area == float("inf"))
    sides = [torch.where(nothing, 0, side.abs() / 2) for side in (width, height)]
    return torch.stack([x, y, *sides, turn.cos(), turn.sin()])


def check(name: str, boxes: Tensor) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 5 or boxes.dtype != torch.float64:
        raise RuntimeError(f"{name}: expected float64 of shape [N, 5], got {boxes.dtype} of {list(boxes.shape)}")


@triton.jit
def _clamped(x, limit):
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))  # keeps NaN


@triton.jit
def _edge_integral(xa, ya, xb, yb, half_w, half_h):
    """Twice the integral of clamp(y, -half_h, half_h) dx from a to b within |x| <= half_w."""
    start, end = _clamped(xa, half_w), _clamped(xb, half_w)
    width = end - start
    slope = (yb - ya) / tl.where(width == 0, 1, xb - xa)
    ya += (start - xa) * slope
    yb -= (xb - end) * slope
    low, high = _clamped(ya, half_h), _clamped(yb, half_h)
    rise, total = high - low, low + high
    return width * (total - rise * ((total - ya - yb) / tl.where(rise == 0, 1, yb - ya)))


@triton.jit
def _intersection(a, b):
    ax, ay, aw, ah, acos, asin = a
    bx, by, bw, bh, bcos, bsin = b
    dx, dy = bx - ax, by - ay
    cx, cy = dx * acos - dy * asin, dx * asin + dy * acos
    sin, turned = bsin * acos - bcos * asin, bcos * acos + bsin * asin
    cos = tl.where(sin == 0, tl.where(turned < 0, -1, 1), turned)  # parallel edges are exactly so
    wx, wy, hx, hy = bw * cos, -bw * sin, bh * sin, bh * cos
    x0, x1, x2, x3 = cx - wx - hx, cx + wx - hx, cx + wx + hx, cx - wx + hx
    y0, y1, y2, y3 = cy - wy - hy, cy + wy - hy, cy + wy + hy, cy - wy + hy
    sum = _edge_integral(x0, y0, x1, y1, aw, ah) + _edge_integral(x1, y1, x2, y2, aw, ah)
    sum = sum + _edge_integral(x2, y2, x3, y3, aw, ah) + _edge_integral(x3, y3, x0, y0, aw, ah)
    return sum * -0.5


@triton.jit
def _iou_of_near(a, b, area_a, area_b):
    least, common = tl.where(area_a < area_b, area_a, area_b), _intersection(a, b)
    common = tl.where(common <= area_a * 1e-14, 0, common)  # of boxes apart it is what rounding leaves
    common = tl.where(common > least, least, common)
    return common / (area_a + area_b - common)


@triton.jit
def rotated_iou(a, b):
    """In [0, 1]; a NaN gives NaN. Computed where circumscribed circles may meet: r + s <= sqrt(2 (r^2 + s^2))."""
    dx, dy, area_a, area_b = b[0] - a[0], b[1] - a[1], a[2] * a[3] * 4, b[2] * b[3] * 4
    distance = dx * dx + dy * dy
    reach = (a[2] * a[2] + a[3] * a[3] + b[2] * b[2] + b[3] * b[3]) * 2.02  # with what rounding takes
    nothing = (distance > reach) | (area_a <= 0) | (area_b <= 0)
    overlap, near = tl.where(nothing, tl.zeros_like(distance), float("nan")), (distance <= reach) & ~nothing
    if tl.max(near.to(tl.int32)) > 0:
        overlap = tl.where(near, _iou_of_near(a, b, area_a, area_b), overlap)
    return overlap
