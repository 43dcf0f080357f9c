"""roi_pool: Fast R-CNN's operator, on a map of stride 16 and on the finest pyramid level."""

import torchvision

import fastcv
from benchmarks import shapes
from benchmarks.harness import Case, as_test, backward, forward

LAYOUTS = {"channels-last": True, "contiguous": False}


def _case(what, k, size, scale, layout, prepare=forward):
    def inputs():
        x = shapes.feature(size, channels_last=LAYOUTS[layout], grad=prepare is backward)
        return x, shapes.rois(k, largest=round(56 / scale)), (7, 7), scale

    return Case(
        "roi_pool",
        f"{what}, {layout}",
        inputs,
        {
            "fastcv": prepare(fastcv.ops.roi_pool),
            "torchvision": prepare(torchvision.ops.roi_pool),
        },
    )


CASES = [
    case
    for layout in LAYOUTS
    for case in (
        _case("1000 RoIs x 256 x 7x7, P2", 1000, (1, 256, 200, 272), 1 / 4, layout),
        _case("300 RoIs x 512 x 7x7, VGG-16", 300, (1, 512, 50, 68), 1 / 16, layout),
        _case("1 RoI x 16 x 7x7", 1, (1, 16, 50, 68), 1 / 16, layout),
        _case("backward, 1000 RoIs x 256 x 7x7, P2", 1000, (1, 256, 200, 272), 1 / 4, layout, backward),
    )
]

test_roi_pool = as_test(CASES)
