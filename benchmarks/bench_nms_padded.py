"""nms_padded: a whole image's classes in one call, against the loop that detectors write."""

import torch
import torchvision

import fastcv
from benchmarks import shapes
from benchmarks.harness import Case, as_test, forward


def _ours(boxes, scores):
    return fastcv.ops.nms_padded(boxes, scores, 0.45, 200, score_threshold=0.01).indices


def _theirs(boxes, scores):
    """Select by score, suppress by class, keep the best 200: torchvision's post-processing."""
    results = []
    for image_boxes, image_scores in zip(boxes, scores, strict=True):
        ids, rows = (image_scores > 0.01).nonzero().unbind(1)
        chosen = image_scores[ids, rows]
        keep = torchvision.ops.batched_nms(image_boxes[rows], chosen, ids, 0.45)[:200]
        results.append(torch.nn.functional.pad(rows[keep], (0, 200 - len(keep)), value=-1))
    return torch.stack(results)


CASES = [
    Case(
        "nms_padded",
        "SSD300: 8,732 boxes x 20 classes above 0.01",
        shapes.ssd300_raw,
        {"fastcv": forward(_ours), "torchvision batched_nms": forward(_theirs)},
        tolerance=0,
    )
]

test_nms_padded = as_test(CASES)
