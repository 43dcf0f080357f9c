"""nms_rotated, against its formula in torch, as no package for torch's CPU has it."""

import torch

import fastcv
from benchmarks.harness import Case, as_test, forward
from fastcv import reference


def rotated_boxes(n: int, spread: float):
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([spread, spread, 60.0, 20.0, 180.0])
    boxes = torch.rand((n, 5), generator=generator) * scale + torch.tensor([0, 0, 8.0, 4.0, -90])
    return boxes, torch.rand(n, generator=generator)


def _in_torch(boxes, scores, threshold):
    """The matrix of IoUs, then one row after another."""
    order = scores.argsort(descending=True, stable=True)
    ranked = boxes[order].double()
    over = reference.box_iou_rotated.box_iou_rotated(ranked, ranked, torch.float64) > threshold
    keep = torch.ones(len(order), dtype=torch.bool)
    for i in range(len(order)):
        if keep[i]:
            keep[i + 1 :] &= ~over[i, i + 1 :]
    return order[keep]


def _nms(n):
    contenders = {
        "fastcv": forward(lambda boxes, scores: fastcv.ops.nms_rotated(boxes, scores, 0.3)),
        "torch": forward(lambda boxes, scores: _in_torch(boxes, scores, 0.3)),
    }
    return Case("nms_rotated", f"{n} boxes in 1000x1000", lambda: rotated_boxes(n, 1000.0), contenders)


CASES = [_nms(1000), _nms(5000)]
test_nms_rotated = as_test(CASES)
