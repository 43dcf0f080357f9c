"""Boxes and scores for the tests of the suppression family, and an oracle in NumPy that shares no code with it."""

import numpy as np
import torch

KINDS = ("mixed", "crowded", "scales", "long", "far", "tiny", "subnormal", "huge", "large", "duplicates", "grid")


def make(kind, n, seed=0, dtype=torch.float32):
    """Boxes [n, 4] of one kind and scores [n]."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    if kind == "mixed":
        corner, side = rand(n, 2) * 1000, torch.exp(rand(n, 2) * 8 - 2)
    elif kind == "crowded":  # of both signs
        corner, side = rand(n, 2) * 100 - 50, rand(n, 2) * 40 + 5
    elif kind == "scales":  # from 1e-9 to 1e9
        scale = torch.exp(rand(n, 1) * 40 - 20)
        corner, side = rand(n, 2) * scale * 3, scale * (0.5 + rand(n, 2))
    elif kind == "long":
        corner, side = rand(n, 2) * 100, torch.stack([rand(n) * 300 + 1, rand(n) * 0.5 + 0.01], 1)
    elif kind == "far":
        corner, side = rand(n, 2) * 300 + 1e6, rand(n, 2) * 60 + 1
    elif kind == "tiny":
        corner, side = rand(n, 2) * 3e-6, rand(n, 2) * 1e-6
    elif kind == "subnormal":  # float32 areas below the smallest normal number
        corner, side = rand(n, 2) * 3e-22, rand(n, 2) * 1e-22
    elif kind == "huge":  # float32 areas overflow
        corner, side = rand(n, 2) * 3e30, rand(n, 2) * 1e30
    elif kind == "large":
        corner, side = rand(n, 2) * 3e18, rand(n, 2) * 1e18
    elif kind == "duplicates":  # and boxes of no area
        corner, side = (rand(n, 2) * 20).floor(), (rand(n, 2) * 6).floor()
    else:  # a grid of equal boxes
        i = torch.arange(n, dtype=torch.float64)
        corner, side = torch.stack([i % 64, i // 64], 1) * 10, torch.full((n, 2), 16.0, dtype=torch.float64)
    boxes = torch.cat([corner, corner + side], 1).to(dtype)
    return boxes, rand(n).to(dtype)


def spoil(boxes, scores):
    """Puts every kind of bad value into copies of the first rows (of 16 at least)."""
    boxes, scores = boxes.clone(), scores.clone()
    for column in range(4):
        boxes[column, column] = float("nan")
    scores[4] = float("nan")
    scores[5], scores[6] = float("inf"), float("-inf")
    boxes[7, 2:] = float("inf")
    boxes[8, :2] = float("-inf")
    boxes[9] = torch.tensor([float("-inf")] * 2 + [float("inf")] * 2)
    boxes[10] = boxes[10][[2, 3, 0, 1]]  # inverted both ways
    boxes[11] = boxes[11][[2, 1, 0, 3]]  # inverted one way
    boxes[12, 2] = boxes[12, 0]  # no area
    boxes[13, 2:] = boxes[13, :2]  # a point
    scores[14] = -1
    scores[15] = -0.0
    return boxes, scores


def iou_matrix(boxes):
    """IoU of all pairs of a NumPy array [n, 4] in its own precision; NaN for 0 / 0 and infinite boxes."""
    x1, y1, x2, y2 = boxes.T
    with np.errstate(all="ignore"):
        width = np.minimum(x2[:, None], x2) - np.maximum(x1[:, None], x1)
        height = np.minimum(y2[:, None], y2) - np.maximum(y1[:, None], y1)
        intersection = np.maximum(width, 0) * np.maximum(height, 0)
        area = (x2 - x1) * (y2 - y1)
        return intersection / (area[:, None] + area - intersection)


def ranked(boxes, scores):
    """Rows without NaN by decreasing score, ties by row."""
    valid = np.flatnonzero(~(np.isnan(boxes).any(1) | np.isnan(scores)))
    return valid[np.argsort(-scores[valid], kind="stable")]


def greedy(iou, order, threshold):
    """Kept rows, given the IoU matrix and the order of the rows."""
    suppressed, kept = np.zeros(len(iou), bool), []
    with np.errstate(invalid="ignore"):
        for row in order:
            if not suppressed[row]:
                kept.append(int(row))
                suppressed |= iou[row].astype(np.float64) > threshold
    return kept


def with_threads(compute):
    """The tensors that compute() returns with 1, 2, 3 and 4 threads, a list of each."""
    before = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3, 4):
            torch.set_num_threads(number)
            results.append(list(compute()))
        return results
    finally:
        torch.set_num_threads(before)


def assert_all_equal(results):
    for other in results[1:]:
        for have, want in zip(other, results[0], strict=True):
            assert torch.equal(have, want)
