"""multiscale_roi_align: the pooler of Faster and Mask R-CNN, against a loop over the levels."""

from collections import OrderedDict

import torch
import torchvision
from torchvision.ops.poolers import LevelMapper

import fastcv
from benchmarks import shapes
from benchmarks.harness import Case, Thunk, as_test

LAYOUTS = {"channels-last": True, "contiguous": False}
SCALES = [1 / stride for stride in shapes.STRIDES]


def _ours(maps, boxes, size):
    return fastcv.ops.multiscale_roi_align(maps, boxes, size, SCALES, 2)


def _torchvision(maps, boxes, size):
    pool = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], size, 2)
    named = OrderedDict((str(i), level) for i, level in enumerate(maps))
    return pool(named, boxes, [shapes.IMAGE] * len(boxes))


def _level_by_level(maps, boxes, size):
    """torchvision's loop, around fastcv's kernel for one level."""
    levels = LevelMapper(2, 5)(boxes)
    rois = torchvision.ops._utils.convert_boxes_to_roi_format(boxes)
    out = maps[0].new_empty(len(rois), maps[0].shape[1], size, size)
    out = out.contiguous(memory_format=torch._prims_common.suggest_memory_format(maps[0]))
    for level, (x, scale) in enumerate(zip(maps, SCALES, strict=True)):
        rows = (levels == level).nonzero()[:, 0]
        out[rows] = fastcv.ops.roi_align(x, rois[rows], size, scale, 2)
    return out


def _forward(function):
    def prepare(maps, boxes, size) -> Thunk:
        def call():
            with torch.no_grad():
                return function(maps, boxes, size)

        return call

    return prepare


def _backward(function):
    def prepare(maps, boxes, size) -> Thunk:
        output = function(maps, boxes, size)
        gradient = torch.ones_like(output)
        return lambda: torch.autograd.grad(output, maps, gradient, retain_graph=True)

    return prepare


def _case(what, images, proposals, size, layout, prepare=_forward):
    def inputs():
        maps = shapes.pyramid(channels_last=LAYOUTS[layout], images=images, grad=prepare is _backward)
        return maps, shapes.proposals(proposals, images), size

    return Case(
        "multiscale_roi_align",
        f"{what}, {layout}",
        inputs,
        {
            "fastcv": prepare(_ours),
            "torchvision": prepare(_torchvision),
            "fastcv, level by level": prepare(_level_by_level),
        },
        tolerance=1e-3,
    )


CASES = [
    case
    for layout in LAYOUTS
    for case in (
        _case("1000 boxes x 256 x 7x7", 1, 1000, 7, layout),
        _case("2 images, 512 boxes each x 256 x 7x7", 2, 512, 7, layout),
        _case("100 boxes x 256 x 14x14", 1, 100, 14, layout),
        _case("10 boxes x 256 x 7x7", 1, 10, 7, layout),
        _case("backward, 512 boxes x 256 x 7x7", 1, 512, 7, layout, _backward),
    )
]

test_multiscale_roi_align = as_test(CASES)
