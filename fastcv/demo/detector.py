"""torchvision's Faster R-CNN (ResNet-50, feature pyramid) on a photograph, 800 pixels high.

Its weights are random, from a fixed seed, so that nothing is downloaded. The layers that give
scores and boxes are scaled to the spread that trained ones have, or all boxes would score alike.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import fastcv

from .stopwatch import Comparison, compare

SIZE = 800
SCORE = 0.05
DETECTIONS = 100


def _spread_outputs(layer: nn.Module, deviation: float) -> None:
    """At its first call, scales the layer so that its output has this standard deviation."""

    def scale(module, inputs, output):
        factor = deviation / output.std()
        module.weight.mul_(factor)
        module.bias.mul_(factor)
        handle.remove()
        return output * factor

    handle = layer.register_forward_hook(scale)


def build(image: Tensor) -> nn.Module:
    """The model, in evaluation mode."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    torch.manual_seed(0)
    model = fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        min_size=SIZE,
        box_score_thresh=SCORE,
        box_detections_per_img=DETECTIONS,
    ).eval()
    _spread_outputs(model.rpn.head.cls_logits, 1.0)
    _spread_outputs(model.rpn.head.bbox_pred, 0.3)
    _spread_outputs(model.roi_heads.box_predictor.cls_score, 2.0)
    _spread_outputs(model.roi_heads.box_predictor.bbox_pred, 1.0)
    with torch.no_grad():
        model([image])
    return model


def same_detections(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Each detection of one has its like in the other; those of nearly equal score may swap places.

    Raises:
        AssertionError: a detection has no like.
    """
    assert len(ours["boxes"]) == len(theirs["boxes"]), "different numbers of detections"
    near = (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(2) < 0.05
    near &= (ours["scores"][:, None] - theirs["scores"]).abs() < 1e-3
    near &= ours["labels"][:, None] == theirs["labels"]
    assert near.any(0).all() and near.any(1).all(), "a detection has no like in the other run"


def run(photograph: np.ndarray, rounds: int) -> tuple[Comparison, int]:
    """Times it as it is, patched and accelerated, and checks that all find the same.

    Args:
        photograph: uint8 ``[H, W, 3]``.
        rounds: timed runs of each way.

    Returns:
        the comparison, and how many detections there are.

    Raises:
        AssertionError: the detections differ.
    """
    from torchvision.ops import boxes, poolers

    image = torch.from_numpy(photograph).permute(2, 0, 1).float() / 255
    model = build(image)

    def pipeline(model):
        with torch.inference_mode():
            return model([image])[0]

    fast = fastcv.accelerate(model)

    where = [(boxes, "batched_nms"), (poolers, "_multiscale_roi_align")]
    comparison = compare(lambda: pipeline(model), lambda: pipeline(fast), where, rounds)
    for result, expected in comparison.results():
        same_detections(result, expected)
    return comparison, len(expected["boxes"])
