"""MTCNN of facenet-pytorch (trained weights in its wheel) finds the faces in a photograph."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import fastcv

from .stopwatch import Comparison, compare


def run(photograph: np.ndarray, rounds: int) -> tuple[Comparison, Tensor, list[float]]:
    """Times it as it is, patched and accelerated, and checks that all find the same.

    Args:
        photograph: uint8 ``[H, W, 3]``.
        rounds: timed runs of each way.

    Returns:
        the comparison, boxes ``[K, 4]`` and probabilities of the faces.

    Raises:
        AssertionError: the detections differ.
    """
    from facenet_pytorch import MTCNN
    from facenet_pytorch.models.utils import detect_face
    from PIL import Image

    network = MTCNN(keep_all=True)
    fast = fastcv.accelerate(network)
    image = Image.fromarray(photograph)

    def pipeline(network):
        boxes, scores = network.detect(image)
        return boxes.astype(np.float32), scores.astype(np.float32)

    comparison = compare(lambda: pipeline(network), lambda: pipeline(fast), [(detect_face, "batched_nms")], rounds)
    for result, (boxes, scores) in comparison.results():
        np.testing.assert_allclose(result[0], boxes, rtol=1e-3, atol=0.05)  # pixels
        np.testing.assert_allclose(result[1], scores, rtol=1e-4)
    return comparison, torch.from_numpy(boxes), scores.tolist()
