"""torchvision's detectors as functions of tensors of fixed sizes, which never wait for the device.

Each is called with the batch of images after the transform ``[N, 3, H, W]``, their sizes in it and before it (height
and width, ``[N, 2]``, on the device), and gives ``boxes [N, D, 4]`` in pixels of the original images, ``scores`` and
``labels`` ``[N, D]``, ``counts [N]``, and what :attr:`outputs` names besides. D is ``detections_per_img``, or the
number of candidates where there are fewer. Rows beyond an image's count influence no other; their boxes, scores and
labels are zeros.

Detections are those of the model itself, to rounding: the same thresholds (``>=`` for proposals, ``>`` for detections),
the same candidates before suppression, the same order. Layers are the model's own, called as modules.

Where the model is on a GPU, a CUDA graph can be captured of a call after the first, which copies anchors there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ._padded import (
    OUT,
    anchors_at,
    best,
    best_unsuppressed,
    chosen,
    clip,
    decode,
    decode_distances,
    large,
    pool,
    resize,
    take,
    unsuppressed,
)

SMALLEST = 1e-2  # side of a detection of RoIHeads


def _features(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    features = model.backbone(images)
    return {"0": features} if isinstance(features, Tensor) else features


def _cells(generator, features: list[Tensor]) -> list[Tensor]:
    """The anchors around the origin, for each level."""
    generator.set_cell_anchors(features[0].dtype, features[0].device)
    return generator.cell_anchors


class RCNN:
    """``GeneralizedRCNN`` with torchvision's ``RegionProposalNetwork`` and ``RoIHeads``.

    Of masks there are the probabilities before they are pasted, ``[N, D, M, M]``; of keypoints the heatmaps
    ``[N, D, K, M, M]``, and ``regions [N, D, 4]``, the boxes in pixels of the batch that they belong to.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        heads = model.roi_heads
        self.outputs = ("boxes", "scores", "labels", "counts")
        self.outputs += ("masks",) if heads.has_mask() else ()
        self.outputs += ("heatmaps", "regions") if heads.has_keypoint() else ()

    def __call__(self, images: Tensor, sizes: Tensor, originals: Tensor) -> tuple[Tensor, ...]:
        heads = self.model.roi_heads
        features = _features(self.model, images)
        proposals, found = self._propose(features, images, sizes)
        boxes, scores, labels, found = self._detect(features, proposals, found, images, sizes)
        results = [resize(boxes, sizes, originals), scores, labels, found.sum(1)]
        if heads.has_mask():
            pooled = pool(heads.mask_roi_pool, features, boxes, images.shape[2])
            logits = heads.mask_predictor(heads.mask_head(pooled))
            own = logits.gather(1, labels.view(-1, 1, 1, 1).expand(-1, 1, *logits.shape[2:]))
            results.append(own[:, 0].sigmoid().unflatten(0, labels.shape))
        if heads.has_keypoint():
            pooled = pool(heads.keypoint_roi_pool, features, boxes, images.shape[2])
            heatmaps = heads.keypoint_predictor(heads.keypoint_head(pooled))
            results += [heatmaps.unflatten(0, labels.shape), boxes]
        return tuple(results)

    def _propose(self, features: dict[str, Tensor], images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Proposals ``[N, P, 4]``, and which of them there are; the others are zeros."""
        rpn, maps = self.model.rpn, list(features.values())
        boxes, logits, levels = [], [], []
        for level, (objectness, deltas, cells) in enumerate(
            zip(*rpn.head(maps), _cells(rpn.anchor_generator, maps), strict=True)
        ):
            objectness = objectness.permute(0, 2, 3, 1)
            grid, objectness = objectness.shape[1:3], objectness.flatten(1)
            deltas = deltas.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            top = min(rpn._pre_nms_top_n["testing"], objectness.shape[1])
            objectness, indices = objectness.topk(top, dim=1)
            anchors = anchors_at(indices, cells, grid, images.shape[2:])
            boxes.append(decode(take(deltas, indices), anchors, rpn.box_coder))
            logits.append(objectness)
            levels.append(torch.full_like(indices, level))
        boxes, scores = clip(torch.cat(boxes, 1), sizes), torch.cat(logits, 1).sigmoid()
        admitted = large(boxes, rpn.min_size) & (scores >= rpn.score_thresh)
        scores, most = scores.masked_fill(~admitted, OUT), rpn._post_nms_top_n["testing"]
        indices, found = best_unsuppressed(boxes, scores, torch.cat(levels, 1), rpn.nms_thresh, most)
        return chosen(boxes, indices, found), found

    def _detect(
        self, features: dict[str, Tensor], proposals: Tensor, found: Tensor, images: Tensor, sizes: Tensor
    ) -> tuple[Tensor, ...]:
        """Boxes in pixels of the batch, scores, labels, and which of them there are."""
        heads = self.model.roi_heads
        pooled = pool(heads.box_roi_pool, features, proposals, images.shape[2])
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        count, classes = found.shape[1], logits.shape[1] - 1  # without the background
        scores = logits.softmax(1).view(-1, count, 1 + classes)[..., 1:]
        deltas = deltas.view(-1, count, 1 + classes, 4)[:, :, 1:]
        boxes = clip(decode(deltas, proposals[:, :, None], heads.box_coder), sizes)
        admitted = (scores > heads.score_thresh) & large(boxes, SMALLEST) & found[..., None]
        scores = scores.masked_fill(~admitted, OUT).transpose(1, 2)
        kept = unsuppressed(boxes.transpose(1, 2).flatten(0, 1), scores.flatten(0, 1), heads.nms_thresh)
        kept = kept.view(-1, classes, count).transpose(1, 2).flatten(1)
        scores, indices, found = best(kept, heads.detections_per_img)
        labels = (1 + indices % classes).masked_fill(~found, 0)
        return chosen(boxes.flatten(1, 2), indices, found), scores, labels, found


class _OneStage:
    """A detector whose head gives scores and boxes at every pixel of its feature maps."""

    outputs = ("boxes", "scores", "labels", "counts")

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, images: Tensor, sizes: Tensor, originals: Tensor) -> tuple[Tensor, ...]:
        maps = list(_features(self.model, images).values())
        results = self.model.head(maps)
        boxes, scores, labels, found = self._detect(maps, results, images, sizes)
        return resize(boxes, sizes, originals), scores, labels, found.sum(1)


class Dense(_OneStage):
    """``RetinaNet`` and ``FCOS``: the best candidates of each level, of all classes, and suppression by class."""

    def __init__(self, model: nn.Module, score: Callable, decode: Callable):
        super().__init__(model)
        self.score, self.decode = score, decode

    def _candidates(self, results: dict[str, Tensor], cells: Tensor, map: Tensor, images: Tensor):
        """The best of a level: boxes, scores (OUT of those that are too low), labels."""
        model, scores = self.model, self.score(results)
        classes, scores = scores.shape[2], scores.flatten(1)
        scores = scores.masked_fill(~(scores > model.score_thresh), OUT)
        scores, indices = scores.topk(min(model.topk_candidates, scores.shape[1]), dim=1)
        places = indices // classes
        anchors = anchors_at(places, cells, map.shape[2:], images.shape[2:])
        boxes = self.decode(take(results["bbox_regression"], places), anchors, model.box_coder)
        return boxes, scores, indices % classes

    def _detect(self, maps: list[Tensor], results: dict[str, Tensor], images: Tensor, sizes: Tensor):
        model = self.model
        cells = _cells(model.anchor_generator, maps)
        lengths = [len(c) * map.shape[2] * map.shape[3] for c, map in zip(cells, maps, strict=True)]
        split = {name: result.split(lengths, dim=1) for name, result in results.items()}
        levels = [
            self._candidates({name: parts[i] for name, parts in split.items()}, cells[i], map, images)
            for i, map in enumerate(maps)
        ]
        boxes, scores, labels = (torch.cat(parts, 1) for parts in zip(*levels, strict=True))
        boxes = clip(boxes, sizes)
        indices, found = best_unsuppressed(boxes, scores, labels, model.nms_thresh, model.detections_per_img)
        scores, labels = (x.gather(1, indices).masked_fill(~found, 0) for x in (scores, labels))
        return chosen(boxes, indices, found), scores, labels, found


def _class_scores(results: dict[str, Tensor]) -> Tensor:
    return results["cls_logits"].sigmoid()


def _centred_scores(results: dict[str, Tensor]) -> Tensor:
    return (results["cls_logits"].sigmoid() * results["bbox_ctrness"].sigmoid()).sqrt()


def retinanet(model: nn.Module) -> Dense:
    return Dense(model, _class_scores, decode)


def fcos(model: nn.Module) -> Dense:
    return Dense(model, _centred_scores, decode_distances)


class SSD(_OneStage):
    """``SSD``: the best candidates of each class, and suppression among them."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._anchors: dict[tuple, Tensor] = {}  # by sizes: images have one, for the transform makes it

    def _anchors_of(self, maps: list[Tensor], images: Tensor) -> Tensor:
        key = (*images.shape[2:], maps[0].dtype, images.device, *(map.shape[2:] for map in maps))
        if key not in self._anchors:
            from torchvision.models.detection.image_list import ImageList

            alone = ImageList(images[:1], [tuple(images.shape[2:])])
            (self._anchors[key],) = self.model.anchor_generator(alone, maps)
        return self._anchors[key]

    def _detect(self, maps: list[Tensor], results: dict[str, Tensor], images: Tensor, sizes: Tensor):
        model = self.model
        boxes = clip(decode(results["bbox_regression"], self._anchors_of(maps, images), model.box_coder), sizes)
        scores = results["cls_logits"].softmax(-1)[..., 1:].transpose(1, 2)
        scores = scores.masked_fill(~(scores > model.score_thresh), OUT)
        count, classes = min(model.topk_candidates, scores.shape[2]), scores.shape[1]
        scores, places = scores.topk(count, dim=2)
        boxes = take(boxes, places.flatten(1))
        kept = unsuppressed(boxes.view(-1, count, 4), scores.flatten(0, 1), model.nms_thresh)
        scores, indices, found = best(kept.view(-1, classes * count), model.detections_per_img)
        labels = (1 + indices // count).masked_fill(~found, 0)
        return chosen(boxes, indices, found), scores, labels, found
