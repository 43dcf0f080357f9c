"""Every public name of torchvision.ops exists in fastcv.ops with the same signature."""

import inspect

import pytest

import fastcv.ops

NAMES = [
    "batched_nms",
    "box_area",
    "box_convert",
    "box_iou",
    "clip_boxes_to_image",
    "complete_box_iou",
    "complete_box_iou_loss",
    "Conv2dNormActivation",
    "Conv3dNormActivation",
    "deform_conv2d",
    "DeformConv2d",
    "distance_box_iou",
    "distance_box_iou_loss",
    "drop_block2d",
    "drop_block3d",
    "DropBlock2d",
    "DropBlock3d",
    "FeaturePyramidNetwork",
    "FrozenBatchNorm2d",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "masks_to_boxes",
    "MLP",
    "MultiScaleRoIAlign",
    "nms",
    "Permute",
    "ps_roi_align",
    "ps_roi_pool",
    "PSRoIAlign",
    "PSRoIPool",
    "remove_small_boxes",
    "roi_align",
    "roi_pool",
    "RoIAlign",
    "RoIPool",
    "sigmoid_focal_loss",
    "SqueezeExcitation",
    "stochastic_depth",
    "StochasticDepth",
]


def test_names_are_those_of_torchvision():
    tv = pytest.importorskip("torchvision").ops
    assert len(NAMES) == 39 and sorted(NAMES) == sorted(tv.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_same_parameters(name):
    """fastcv may add parameters, keyword or last, if they have defaults."""
    tv = pytest.importorskip("torchvision").ops
    mine, theirs = getattr(fastcv.ops, name), getattr(tv, name)
    assert inspect.isclass(mine) == inspect.isclass(theirs)
    mine, theirs = (list(inspect.signature(f).parameters.values()) for f in (mine, theirs))
    count = len(theirs)
    assert [p.name for p in mine[:count]] == [p.name for p in theirs]
    assert [p.kind for p in mine[:count]] == [p.kind for p in theirs]
    assert [p.default for p in mine[:count]] == [p.default for p in theirs]
    assert all(p.default is not p.empty for p in mine[count:])


@pytest.mark.parametrize("name", NAMES)
def test_listed_and_documented(name):
    assert name in fastcv.ops.__all__
    assert inspect.getdoc(getattr(fastcv.ops, name))
