"""Boxes of all images of a batch side by side, ``[N, K, 4]``, in steps whose shapes do not depend on their values.

What drops out keeps its row with a score of -infinity, so that nothing waits for the device to say how many are left.
The arithmetic is torchvision's, element for element; constants are numbers, never tensors from the host's memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..reference.roi_align import roi_levels

OUT = float("-inf")
ADMITTED = -1.0  # below all probabilities and above OUT, as a threshold


def take(rows: Tensor, indices: Tensor) -> Tensor:
    """Rows ``[N, R, C]`` at ``indices [N, K]``: ``[N, K, C]``."""
    return rows.gather(1, indices[..., None].expand(-1, -1, rows.shape[2]))


def anchors_at(indices: Tensor, cells: Tensor, grid: tuple[int, int], image: tuple[int, int]) -> Tensor:
    """The anchors of a level with these numbers: row by row and pixel by pixel, ``cells [A, 4]`` at each."""
    pixel = indices // len(cells)
    y, x = pixel // grid[1] * (image[0] // grid[0]), pixel % grid[1] * (image[1] // grid[1])
    return torch.stack((x, y, x, y), -1) + cells[indices % len(cells)]


def decode(deltas: Tensor, anchors: Tensor, coder) -> Tensor:
    """Boxes ``[..., 4]`` from a ``BoxCoder``'s offsets of centre and logarithm of size."""
    x1, y1, x2, y2 = anchors.to(deltas.dtype).unbind(-1)
    dx, dy, dw, dh = (delta / weight for delta, weight in zip(deltas.unbind(-1), coder.weights, strict=True))
    width, height = x2 - x1, y2 - y1
    x, y = dx * width + (x1 + 0.5 * width), dy * height + (y1 + 0.5 * height)
    half_width = 0.5 * (dw.clamp(max=coder.bbox_xform_clip).exp() * width)
    half_height = 0.5 * (dh.clamp(max=coder.bbox_xform_clip).exp() * height)
    return torch.stack((x - half_width, y - half_height, x + half_width, y + half_height), -1)


def decode_distances(distances: Tensor, anchors: Tensor, coder) -> Tensor:
    """Boxes ``[..., 4]`` from a ``BoxLinearCoder``'s distances from the anchor's centre to the four sides."""
    x1, y1, x2, y2 = anchors.to(distances.dtype).unbind(-1)
    x, y, width, height = 0.5 * (x1 + x2), 0.5 * (y1 + y2), x2 - x1, y2 - y1
    if coder.normalize_by_size:
        distances = distances * torch.stack((width, height, width, height), -1)
    left, top, right, bottom = distances.unbind(-1)
    return torch.stack((x - left, y - top, x + right, y + bottom), -1)


def _of_images(pairs: Tensor, boxes: Tensor) -> Tensor:
    """``[N, 2]`` (vertical, horizontal) in the place of each coordinate of boxes ``[N, ..., 4]``."""
    return pairs.flip(1).repeat(1, 2).view(-1, *[1] * (boxes.dim() - 2), 4)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """``boxes [N, ..., 4]`` within their images of ``sizes [N, 2]``, height and width."""
    return torch.minimum(boxes.clamp(min=0), _of_images(sizes.to(boxes.dtype), boxes))


def resize(boxes: Tensor, sizes: Tensor, originals: Tensor) -> Tensor:
    """``boxes [N, K, 4]`` of images of ``sizes`` in those of the sizes ``originals``."""
    return (boxes * _of_images(originals.float() / sizes.float(), boxes)).to(boxes.dtype)


def large(boxes: Tensor, least: float) -> Tensor:
    """Which boxes have both sides of at least this length."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= least).all(-1)


def unsuppressed(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """``scores [R, K]``, OUT where suppression among the boxes of a row, ``[R, K, 4]``, keeps none.

    A row for each class: suppression takes time by the length of rows, which are short then.
    """
    length = scores.shape[1]
    kept = ops.nms_padded(boxes, scores, iou_threshold, length, score_threshold=ADMITTED).indices
    keep = torch.zeros(kept.shape[0], length + 1, dtype=torch.bool, device=kept.device)
    keep.scatter_(1, kept % (length + 1), True)  # -1 is the column too many
    return scores.masked_fill(~keep[:, :length], OUT)


def best_unsuppressed(
    boxes: Tensor, scores: Tensor, ids: Tensor, iou_threshold: float, most: int
) -> tuple[Tensor, Tensor]:
    """The best of ``boxes [N, K, 4]`` that suppression among those of one id keeps: indices ``[N, D]``, 0 where none is
    left, and whether there is one."""
    most = min(most, boxes.shape[1])
    kept = ops.nms_padded(boxes, scores, iou_threshold, most, idxs=ids, score_threshold=ADMITTED).indices
    return kept.clamp(min=0), kept >= 0


def best(scores: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best of each row of ``scores [N, K]``, equal ones in their order: ``[N, D]``, 0 where none is left, their
    indices, and whether there is one."""
    ranked, order = scores.sort(dim=1, descending=True, stable=True)
    found = ranked[:, :most] > OUT
    return ranked[:, :most].masked_fill(~found, 0), order[:, :most], found


def chosen(boxes: Tensor, indices: Tensor, found: Tensor) -> Tensor:
    """``boxes [N, K, 4]`` at ``indices [N, D]``, and zeros where nothing was found."""
    return take(boxes, indices).masked_fill(~found[..., None], 0)


# ---- regions of a feature pyramid ----------------------------------------------------------------------------


def _scales(pooler, maps: list[Tensor], height: int) -> list[float]:
    """Those that the pooler has found at an earlier call, else from the height of the padded images."""
    return list(pooler.scales or [2.0 ** round(math.log2(map.shape[-2] / height)) for map in maps])


def pool(pooler, features: dict[str, Tensor], boxes: Tensor, height: int) -> Tensor:
    """What torchvision's ``MultiScaleRoIAlign`` gives for ``boxes [N, P, 4]``: ``[N * P, C, PH, PW]``.

    It counts its maps as consecutive levels from the first one's to the last one's scale, and gives zeros where there
    is no map of a region's level.
    """
    maps = [map for name, map in features.items() if name in pooler.featmap_names]
    scales = _scales(pooler, maps, height)
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))  # half types cannot hold large image numbers
    images, count = boxes.shape[:2]
    number = torch.arange(images, dtype=boxes.dtype, device=boxes.device)
    rois = torch.cat((number[:, None, None].expand(-1, count, 1), boxes), 2).flatten(0, 1)
    options = pooler.output_size, pooler.sampling_ratio
    if len(maps) == 1:
        return ops.roi_align(maps[0], rois, options[0], scales[0], options[1])
    first, last = (int(-math.log2(scale)) for scale in (scales[0], scales[-1]))
    levels = [2.0**-level for level in range(first, last + 1)]
    canonical = {"canonical_scale": pooler.canonical_scale, "canonical_level": pooler.canonical_level}
    if scales[: len(levels)] == levels:
        return ops.multiscale_roi_align(maps[: len(levels)], rois, options[0], levels, options[1], **canonical)
    level = roi_levels(rois, levels, *canonical.values())[:, None, None, None]
    pooled = [ops.roi_align(map, rois, options[0], scale, options[1]) for map, scale in zip(maps, scales, strict=True)]
    return sum(p.masked_fill(level != i, 0) for i, p in enumerate(pooled))
