"""MTCNN of facenet-pytorch (trained weights in its wheel) finds the faces in a photograph."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .stopwatch import Comparison, compare


def run(photograph: np.ndarray, rounds: int) -> tuple[Comparison, Tensor, list[float]]:
    """Times it both ways and checks that both find the same.

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
    image = Image.fromarray(photograph)

    def pipeline():
        boxes, scores = network.detect(image)
        return boxes.astype(np.float32), scores.astype(np.float32)

    comparison = compare(pipeline, [(detect_face, "batched_nms")], rounds)
    boxes, scores = comparison.plain[0].result
    for other in comparison.patched:
        np.testing.assert_allclose(other.result[0], boxes, rtol=1e-5)
        np.testing.assert_allclose(other.result[1], scores, rtol=1e-5)
    return comparison, torch.from_numpy(boxes), scores.tolist()
