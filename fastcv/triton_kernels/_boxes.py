"""Boxes in the kernels of the suppression family, with the operations of torchvision's nms in their order.

Kernels that use this are launched with ``ROUNDED``: a product that is fused into a sum is rounded otherwise than the
CPU's, and the boxes kept would differ.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
ROUNDED = {"enable_fp_fusion": False}
"""The option of launches (and :class:`Variant`'s) without fused multiply-adds."""


@triton.jit
def divide(a, b):
    """Rounded as IEEE 754 has it: in float32 "/" is not."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def not_negative(x):
    return tl.where(x < 0, 0, x)  # NaN stays NaN


@triton.jit
def load_corners(boxes, row, mask):
    """Of boxes [N, 4]; where there is none NaN, which overlaps nothing."""
    at, nan = boxes + row.to(tl.int64) * 4, float("nan")
    x1, y1 = tl.load(at, mask=mask, other=nan), tl.load(at + 1, mask=mask, other=nan)
    x2, y2 = tl.load(at + 2, mask=mask, other=nan), tl.load(at + 3, mask=mask, other=nan)
    return x1, y1, x2, y2


@triton.jit
def intersection(a, b):
    """Of boxes (x1, y1, x2, y2)."""
    ax1, ay1, ax2, ay2 = a
    bx1, by1, bx2, by2 = b
    width = not_negative(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1))
    return width * not_negative(tl.minimum(ay2, by2) - tl.maximum(ay1, by1))


@triton.jit
def area(a):
    x1, y1, x2, y2 = a
    return (x2 - x1) * (y2 - y1)


@triton.jit
def iou(a, b):
    common = intersection(a, b)
    return divide(common, area(a) + area(b) - common)


@triton.jit
def diou(a, b):
    """The IoU less the squared distance of the centres over the squared diagonal of what encloses both."""
    ax1, ay1, ax2, ay2 = a
    bx1, by1, bx2, by2 = b
    width, height = tl.maximum(ax2, bx2) - tl.minimum(ax1, bx1), tl.maximum(ay2, by2) - tl.minimum(ay1, by1)
    dx, dy = ((ax1 + ax2) - (bx1 + bx2)) * 0.5, ((ay1 + ay2) - (by1 + by2)) * 0.5
    return iou(a, b) - divide(dx * dx + dy * dy, width * width + height * height)


# ---- on the host ----------------------------------------------------------------------------------------------------


def number_type(*tensors: Tensor) -> torch.dtype:
    """Half types are compared in float32; one float64 takes the others along."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def round_down(x: float, dtype: torch.dtype) -> float:
    """The largest number of the type not above x, so that comparing with it decides as comparing with x does."""
    if dtype == torch.float64 or not math.isfinite(x):
        return x
    with np.errstate(over="ignore"):
        y = np.float32(x)
    return float(np.nextafter(y, np.float32("-inf")) if float(y) > x else y)
