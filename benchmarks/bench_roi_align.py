"""roi_align: box and mask heads of Faster and Mask R-CNN, forward and backward, both layouts."""

import torchvision

import fastcv
from benchmarks import shapes
from benchmarks.harness import Case, as_test, backward, forward

FINEST = (1, 256, 200, 272)  # P2 of a feature pyramid, stride 4
LAYOUTS = {"channels-last": True, "contiguous": False}


def _inputs(k, pooled, sampling, channels_last, size=FINEST, scale=0.25, grad=False):
    x = shapes.feature(size, channels_last=channels_last, grad=grad)
    return x, shapes.rois(k), (pooled, pooled), scale, sampling, False


def _case(what, k, pooled, sampling, layout, prepare=forward, **options):
    return Case(
        "roi_align",
        f"{what}, {layout}",
        lambda: _inputs(k, pooled, sampling, LAYOUTS[layout], grad=prepare is backward, **options),
        {
            "fastcv": prepare(fastcv.ops.roi_align),
            "torchvision": prepare(torchvision.ops.roi_align),
        },
        tolerance=1e-3,
    )


CASES = [
    case
    for layout in LAYOUTS
    for case in (
        _case("1000 RoIs x 256 x 7x7, sampling 2", 1000, 7, 2, layout),
        _case("1000 RoIs x 256 x 7x7, adaptive sampling", 1000, 7, -1, layout),
        _case("100 RoIs x 256 x 14x14, sampling 2", 100, 14, 2, layout),
        _case("8 RoIs x 256 x 7x7, sampling 2", 8, 7, 2, layout),
        _case("1 RoI x 16 x 7x7, sampling 2", 1, 7, 2, layout, size=(1, 16, 50, 68), scale=1 / 16),
        _case("backward, 1000 RoIs x 256 x 7x7, sampling 2", 1000, 7, 2, layout, backward),
        _case("backward, 100 RoIs x 256 x 14x14, adaptive", 100, 14, -1, layout, backward),
    )
]

test_roi_align = as_test(CASES)
