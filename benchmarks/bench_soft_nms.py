"""soft_nms: against the package ensemble-boxes (NumPy) and a loop in PyTorch."""

import ensemble_boxes
import torch

import fastcv
from benchmarks import shapes
from benchmarks.harness import Case, as_test, forward


def _inputs(n):
    boxes, scores = shapes.clustered_boxes(n, 40)
    return boxes / 2000 + 0.2, scores


def _ours(boxes, scores):
    return fastcv.ops.soft_nms(boxes, scores, 0.3, 0.5, 0.001, method="gaussian")[1]


def _loop(boxes, scores):
    return fastcv.reference.soft_nms.soft_nms(boxes, scores, None, 0.3, 0.5, 0.001, "gaussian")[1]


def _ensemble_boxes(boxes, scores):
    labels = torch.zeros(len(scores)).numpy()
    _, kept, _ = ensemble_boxes.soft_nms(
        [boxes.numpy()], [scores.numpy().copy()], [labels], method=2, sigma=0.5, thresh=0.001
    )
    return torch.from_numpy(kept).float().sort(descending=True).values


CASES = [
    Case(
        "soft_nms",
        f"Gaussian, {n:,} boxes on 40 objects",
        lambda n=n: _inputs(n),
        {
            "fastcv": forward(_ours),
            "ensemble-boxes": forward(_ensemble_boxes),
            "PyTorch loop": forward(_loop),
        },
        quick=n <= 300,
    )
    for n in (300, 2_000)
]

test_soft_nms = as_test(CASES)
