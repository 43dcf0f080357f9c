"""batched_nms: the suppression steps of Faster R-CNN, SSD300 and YOLO."""

import torch
import torchvision

import fastcv
from benchmarks import shapes
from benchmarks.harness import Case, as_test, forward

CONTENDERS = {
    "fastcv": forward(fastcv.ops.batched_nms),
    "torchvision": forward(torchvision.ops.batched_nms),
}


def _shifted(boxes, scores, ids, iou_threshold):
    """What YOLO repositories do: classes apart by 7680 pixels, one call of torchvision's nms."""
    return torchvision.ops.nms(boxes + ids[:, None] * 7680.0, scores, iou_threshold)


YOLO_CONTENDERS = {
    **CONTENDERS,
    "torchvision nms, shifted": forward(_shifted),
}


def _agree_but_for_rounding(ours, theirs):
    """Shifted coordinates lose up to 10 bits, which decides a few boxes at the threshold."""
    differ = torch.isin(ours, theirs, invert=True).sum() + torch.isin(theirs, ours, invert=True).sum()
    assert differ <= 2e-3 * len(theirs), f"{differ} of {len(theirs)} boxes differ"


def _random(n, count):
    return *shapes.random_boxes(n), shapes.classes(n, count), 0.5


CASES = [
    Case("batched_nms", "1,000 boxes, 80 classes", lambda: _random(1_000, 80), CONTENDERS),
    Case("batched_nms", "10,000 boxes, 80 classes", lambda: _random(10_000, 80), CONTENDERS),
    Case(
        "batched_nms",
        "Faster R-CNN: 4,663 proposals, 5 levels",
        lambda: (*shapes.rpn_proposals(), 0.7),
        CONTENDERS,
    ),
    Case(
        "batched_nms",
        "SSD300: 8,732 boxes x 20 classes, best 400 each",
        lambda: (*shapes.ssd300_candidates(), 0.45),
        CONTENDERS,
    ),
    *(
        Case(
            "batched_nms",
            f"YOLO: {n:,} boxes x 80 classes at 0.001",
            lambda n=n: (*shapes.yolo_candidates(n), 0.7),
            YOLO_CONTENDERS,
            agree=_agree_but_for_rounding,
            quick=n == 8400,
        )
        for n in (8400, 25200)
    ),
]

test_batched_nms = as_test(CASES)
