"""weighted_boxes_fusion: five models on one image, against the package ensemble-boxes (NumPy)."""

import ensemble_boxes
import torch

import fastcv
from benchmarks import shapes
from benchmarks.harness import Case, as_test, forward

MODELS = 5


def _inputs(n):
    boxes, scores, labels = [], [], []
    for model in range(MODELS):
        b, s = shapes.clustered_boxes(n, 40, seed=0)
        jitter = torch.randn(b.shape, generator=torch.Generator().manual_seed(model)) * 2
        boxes.append(((b + jitter) / 2000 + 0.2).double())
        scores.append(s.roll(model).double())
        labels.append(torch.arange(n) % 10)
    return boxes, scores, labels


def _ours(boxes, scores, labels):
    return fastcv.ops.weighted_boxes_fusion(boxes, scores, labels)[1]


def _theirs(boxes, scores, labels):
    lists = [[x.numpy() for x in values] for values in (boxes, scores, labels)]
    return torch.from_numpy(ensemble_boxes.weighted_boxes_fusion(*lists)[1]).double()


CASES = [
    Case(
        "weighted_boxes_fusion",
        f"{MODELS} models, {n} boxes each, 10 classes",
        lambda n=n: _inputs(n),
        {"fastcv": forward(_ours), "ensemble-boxes": forward(_theirs)},
        tolerance=1e-6,
        quick=n <= 100,
    )
    for n in (100, 1000)
]

test_weighted_boxes_fusion = as_test(CASES)
