"""soft_nms: against the package ensemble-boxes (NumPy) and a loop in PyTorch.

ensemble-boxes returns the boxes kept with their first scores, so these are what is compared.
"""

import ensemble_boxes
import torch

import fastcv
from benchmarks import shapes
from benchmarks.harness import Case, as_test, forward


def _inputs(n):
    boxes, scores = shapes.clustered_boxes(n, 40)
    return boxes / 2000 + 0.2, scores


def _ours(boxes, scores):
    kept, _ = fastcv.ops.soft_nms(boxes, scores, 0.3, 0.5, 0.001, method="gaussian")
    return scores[kept].sort().values


def _loop(boxes, scores):
    loop = fastcv.reference.soft_nms.soft_nms
    return scores[loop(boxes, scores, None, 0.3, 0.5, 0.001, "gaussian")[0]].sort().values


def _ensemble_boxes(boxes, scores):
    labels = torch.zeros(len(scores)).numpy()
    _, kept, _ = ensemble_boxes.soft_nms([boxes.numpy()], [scores.numpy()], [labels], method=2, sigma=0.5, thresh=0.001)
    return torch.from_numpy(kept).float().sort().values


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
