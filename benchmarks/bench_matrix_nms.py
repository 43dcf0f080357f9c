"""matrix_nms: SOLOv2's scale and a batch, against the matrices of its paper in PyTorch."""

import fastcv
from benchmarks import shapes
from benchmarks.harness import Case, as_test, forward


def _ours(boxes, scores, ids):
    return fastcv.ops.matrix_nms(boxes, scores, idxs=ids)


def _theirs(boxes, scores, ids):
    """Algorithm 1 of the paper, on boxes sorted by score."""
    order = scores.argsort(descending=True, stable=True)
    sorted_boxes, same = boxes[order], ids[order][:, None] == ids[order]
    overlap = (fastcv.ops.box_iou(sorted_boxes, sorted_boxes) * same).triu(1)
    most = overlap.max(0).values[:, None]
    decay = (-2.0 * (overlap**2 - most**2)).exp().min(0).values.clamp(max=1)
    lowered = scores.clone()
    lowered[order] = scores[order] * decay
    return lowered


CASES = [
    Case(
        "matrix_nms",
        f"Gaussian, {n:,} boxes, 80 classes",
        lambda n=n: (*shapes.clustered_boxes(n, 40), shapes.classes(n, 80)),
        {"fastcv": forward(_ours), "PyTorch": forward(_theirs)},
    )
    for n in (500, 2_000)
]

test_matrix_nms = as_test(CASES)
