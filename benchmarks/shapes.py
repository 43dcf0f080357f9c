"""Inputs with the shapes of real pipelines, from fixed seeds. Boxes are ``[x1, y1, x2, y2]``."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

IMAGE = (800, 1088)  # height and width that detectors of 800 pixels give a photograph of 4:3
STRIDES = (4, 8, 16, 32)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- suppression ---------------------------------------------------------------------------------


def _distinct(scores: Tensor) -> Tensor:
    """Moves equal scores apart, by units in the last place: not all order them alike."""
    ordered, order = scores.flatten().view(torch.int32).long().sort()  # bits rise with the number
    steps = torch.arange(len(ordered))
    apart = ((ordered - steps).cummax(0).values + steps).int().view(torch.float32)
    return torch.empty_like(apart).scatter_(0, order, apart).reshape(scores.shape)


def random_boxes(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``n`` boxes of 10 to 110 pixels, anywhere in 1000 x 1000, and uniform scores."""
    generator = _generator(seed)
    corner = torch.rand(n, 2, generator=generator) * 1000
    size = torch.rand(n, 2, generator=generator) * 100 + 10
    scores = _distinct(torch.rand(n, generator=generator))
    return torch.cat([corner, corner + size], 1), scores


def clustered_boxes(n: int, objects: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``n`` boxes around few objects, as a trained detector gives them before suppression."""
    generator = _generator(seed)
    centre = torch.rand(objects, 2, generator=generator) * torch.tensor([IMAGE[1], IMAGE[0]])
    size = torch.exp(torch.rand(objects, 2, generator=generator) * 3 + 2.5)
    which = torch.randint(objects, (n,), generator=generator)
    noise = torch.randn(n, 4, generator=generator) * 0.1
    middle = centre[which] + noise[:, :2] * size[which]
    half = size[which] * torch.exp(noise[:, 2:]) / 2
    scores = _distinct(torch.rand(n, generator=generator))
    return torch.cat([middle - half, middle + half], 1), scores


def classes(n: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(count, (n,), generator=_generator(seed + 1))


def rpn_proposals(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Faster R-CNN's first stage: the best 1000 of each of five pyramid levels, as classes."""
    levels = [clustered_boxes(1000 if i < 4 else 663, 60, seed + i) for i in range(5)]
    ids = [torch.full((len(scores),), i) for i, (_, scores) in enumerate(levels)]
    scores = _distinct(torch.cat([s for _, s in levels]))
    return torch.cat([b for b, _ in levels]), scores, torch.cat(ids)


def ssd300_default_boxes() -> Tensor:
    """The 8732 default boxes of SSD300 in pixels (Liu et al., "SSD", ECCV 2016, section 2.2)."""
    boxes = []
    scales = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
    for k, (cells, ratios) in enumerate(
        zip([38, 19, 10, 5, 3, 1], [[2], [2, 3], [2, 3], [2, 3], [2], [2]], strict=True)
    ):
        sizes = [(scales[k], scales[k]), (math.sqrt(scales[k] * scales[k + 1]),) * 2]
        for ratio in ratios:
            w, h = scales[k] * math.sqrt(ratio), scales[k] / math.sqrt(ratio)
            sizes += [(w, h), (h, w)]
        grid = (torch.arange(cells) + 0.5) / cells
        y, x = torch.meshgrid(grid, grid, indexing="ij")
        centre = torch.stack([x, y], 2).reshape(-1, 1, 2)
        half = torch.tensor(sizes).reshape(1, -1, 2) / 2
        boxes.append(torch.cat([centre - half, centre + half], 2).reshape(-1, 4))
    return (torch.cat(boxes) * 300).clamp(0, 300)


def ssd300_candidates(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """SSD300 on Pascal VOC: the best 400 of 8732 boxes for each of 20 classes, above 0.01."""
    generator = _generator(seed)
    defaults = ssd300_default_boxes()
    moved = defaults + torch.randn(defaults.shape, generator=generator) * 3
    logits = torch.randn(len(moved), 20, generator=generator) * 2 - 9
    scores, rows = torch.sigmoid(logits).topk(400, dim=0)
    keep = scores.T.flatten() > 0.01
    ids = torch.arange(20).repeat_interleave(400)
    return moved[rows.T.flatten()][keep], _distinct(scores.T.flatten()[keep]), ids[keep]


def ssd300_raw(seed: int = 0) -> tuple[Tensor, Tensor]:
    """The same before selection: boxes ``[1, 8732, 4]``, scores ``[1, 20, 8732]``."""
    generator = _generator(seed)
    defaults = ssd300_default_boxes()
    moved = defaults + torch.randn(defaults.shape, generator=generator) * 3
    logits = torch.randn(20, len(moved), generator=generator) * 2 - 9
    return moved[None], _distinct(torch.sigmoid(logits))[None]


def yolo_candidates(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """YOLO on COCO at 640 pixels, at confidence 0.001: up to 30,000 pairs of box and class.

    Args:
        n: boxes of the network, 8400 (one per cell at strides 8, 16 and 32) or 25200 (three per
        cell).
    """
    generator = _generator(seed)
    centres, sizes = [], []
    for stride in (8, 16, 32):
        grid = (torch.arange(640 // stride) + 0.5) * stride
        y, x = torch.meshgrid(grid, grid, indexing="ij")
        cells = torch.stack([x.flatten(), y.flatten()], 1).repeat(n // 8400, 1)
        centres.append(cells + torch.randn(cells.shape, generator=generator) * stride / 2)
        sizes.append(torch.exp(torch.randn(cells.shape, generator=generator) * 0.5) * stride * 4)
    centre, half = torch.cat(centres), torch.cat(sizes) / 2
    boxes = torch.cat([centre - half, centre + half], 1)
    confidence = torch.sigmoid(torch.randn(n, 80, generator=generator) * 2 - 9)
    rows, ids = (confidence > 0.001).nonzero().unbind(1)
    scores = _distinct(confidence[rows, ids])
    best = scores.argsort(descending=True)[:30000]
    return boxes[rows[best]], scores[best], ids[best]


# ---- regions -------------------------------------------------------------------------------------


def feature(size: tuple[int, ...], *, channels_last: bool, seed: int = 0, grad: bool = False) -> Tensor:
    x = torch.randn(size, generator=_generator(seed))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(grad)


@functools.cache
def _proposal_boxes(n: int, largest: int, seed: int) -> Tensor:
    generator = _generator(seed)
    height, width = IMAGE
    size = torch.exp(torch.rand(n, 1, generator=generator) * math.log(largest / 16)) * 16
    shape = torch.exp(torch.randn(n, 1, generator=generator) * 0.4)
    wh = torch.cat([size * shape, size / shape], 1)
    corner = torch.rand(n, 2, generator=generator) * torch.tensor([width, height]) - wh / 2
    boxes = torch.cat([corner, corner + wh], 1)
    limit = torch.tensor([width, height, width, height])
    return boxes.clamp(min=0).minimum(limit)


def proposals(n: int, images: int = 1, largest: int = 512, seed: int = 0) -> list[Tensor]:
    """``n`` boxes in each image: sizes log-uniform from 16 pixels up, clipped to the image."""
    return [_proposal_boxes(n, largest, seed + i) for i in range(images)]


def rois(n: int, images: int = 1, largest: int = 224, seed: int = 0) -> Tensor:
    """The same as RoIs ``[K, 5]`` with their image's index first; sizes as on the finest level."""
    boxes = proposals(n, images, largest, seed)
    index = [torch.full((len(b), 1), float(i)) for i, b in enumerate(boxes)]
    return torch.cat([torch.cat([i, b], 1) for i, b in zip(index, boxes, strict=True)])


def pyramid(*, channels_last: bool, images: int = 1, grad: bool = False) -> list[Tensor]:
    """The four levels of 256 channels that a feature pyramid gives for ``IMAGE``."""
    return [
        feature(
            (images, 256, IMAGE[0] // stride, IMAGE[1] // stride),
            channels_last=channels_last,
            seed=stride,
            grad=grad,
        )
        for stride in STRIDES
    ]
