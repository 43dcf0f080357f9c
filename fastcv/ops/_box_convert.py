"""The arithmetic of ``box_convert``; the formats are described there.

Each family of formats has a hub, ``xyxy`` or ``xywhr``, through which all its conversions go.
"""

from __future__ import annotations

import torch
from torch import Tensor

AXIS_ALIGNED_COLUMNS = {"xyxy": 4, "xywh": 4, "cxcywh": 4}
ROTATED_COLUMNS = {"cxcywhr": 5, "xywhr": 5, "xyxyxyxy": 8}


def _xywh_to_xyxy(boxes: Tensor) -> Tensor:
    x, y, w, h = boxes.unbind(-1)
    return torch.stack((x, y, x + w, y + h), dim=-1)


def _xyxy_to_xywh(boxes: Tensor) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack((x1, y1, x2 - x1, y2 - y1), dim=-1)


def _cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    cx, cy, w, h = boxes.unbind(-1)
    half_w, half_h = 0.5 * w, 0.5 * h
    return torch.stack((cx - half_w, cy - half_h, cx + half_w, cy + half_h), dim=-1)


def _xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    x1, y1, x2, y2 = (boxes if boxes.is_floating_point() else boxes.float()).unbind(-1)
    return torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), dim=-1)


def _like(values: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
    stacked = torch.stack(values, dim=-1)
    return (stacked if boxes.is_floating_point() else stacked.round()).to(boxes.dtype)


def _half_diagonal(w: Tensor, h: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """From the first corner to the centre; the edges run along (cos, -sin) and (sin, cos)."""
    cos, sin = torch.cos(torch.deg2rad(r)), torch.sin(torch.deg2rad(r))
    return (w * cos + h * sin) / 2, (h * cos - w * sin) / 2


def _floating(boxes: Tensor) -> Tensor:
    return boxes.to(torch.promote_types(boxes.dtype, torch.float32))


def _cxcywhr_to_xywhr(boxes: Tensor) -> Tensor:
    cx, cy, w, h, r = _floating(boxes).unbind(-1)
    dx, dy = _half_diagonal(w, h, r)
    return _like((cx - dx, cy - dy, w, h, r), boxes)


def _xywhr_to_cxcywhr(boxes: Tensor) -> Tensor:
    x, y, w, h, r = _floating(boxes).unbind(-1)
    dx, dy = _half_diagonal(w, h, r)
    return _like((x + dx, y + dy, w, h, r), boxes)


def _xywhr_to_xyxyxyxy(boxes: Tensor) -> Tensor:
    x, y, w, h, r = _floating(boxes).unbind(-1)
    cos, sin = torch.cos(torch.deg2rad(r)), torch.sin(torch.deg2rad(r))
    wx, wy, hx, hy = w * cos, -w * sin, h * sin, h * cos
    return _like((x, y, x + wx, y + wy, x + wx + hx, y + wy + hy, x + hx, y + hy), boxes)


def _xyxyxyxy_to_xywhr(boxes: Tensor) -> Tensor:
    x1, y1, x2, y2, x3, y3, _, _ = _floating(boxes).unbind(-1)
    r = torch.rad2deg(torch.atan2(y1 - y2, x2 - x1))
    return _like((x1, y1, torch.hypot(x2 - x1, y2 - y1), torch.hypot(x3 - x2, y3 - y2), r), boxes)


# Per format: to the hub, from the hub.
CONVERSIONS = {
    "xyxy": (None, None),
    "xywh": (_xywh_to_xyxy, _xyxy_to_xywh),
    "cxcywh": (_cxcywh_to_xyxy, _xyxy_to_cxcywh),
    "xywhr": (None, None),
    "cxcywhr": (_cxcywhr_to_xywhr, _xywhr_to_cxcywhr),
    "xyxyxyxy": (_xyxyxyxy_to_xywhr, _xywhr_to_xyxyxyxy),
}
