"""match_boxes: the anchors of a feature pyramid and a second stage's proposals, against box_iou and Matcher."""

import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

import fastcv
from benchmarks import shapes
from benchmarks.harness import Case, as_test, forward


def _anchors():
    """Three for each cell of the strides 4 to 64 of an image of 800 x 1088."""
    levels = []
    for stride in (4, 8, 16, 32, 64):
        y, x = torch.meshgrid(torch.arange(0, 800, stride), torch.arange(0, 1088, stride), indexing="ij")
        centre = torch.stack([x, y], 2).reshape(-1, 1, 2)
        half = 4 * stride * torch.tensor([[1.0, 1.0], [0.7, 1.4], [1.4, 0.7]])
        levels.append(torch.cat([centre - half, centre + half], 2).reshape(-1, 4))
    return torch.cat(levels)


def _case(what, boxes, truths, *options):
    def inputs():
        return shapes.clustered_boxes(truths, truths)[0], boxes()

    contenders = {
        "fastcv": forward(lambda truth, boxes: fastcv.ops.match_boxes(truth, boxes, *options)),
        "torchvision": forward(lambda truth, boxes: Matcher(*options)(box_iou(truth, boxes))),
    }
    return Case("match_boxes", f"{what}, {truths} ground truths", inputs, contenders)


def _proposals():
    return shapes.clustered_boxes(2000, 60)[0]


CASES = [
    _case("anchors of 800x1088", _anchors, 20, 0.7, 0.3, True),
    _case("anchors of 800x1088", _anchors, 3, 0.7, 0.3, True),
    _case("2000 proposals", _proposals, 20, 0.5, 0.5, False),
]

test_match_boxes = as_test(CASES)
