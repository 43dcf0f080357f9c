"""ps_roi_align and ps_roi_pool: R-FCN's and Light-Head R-CNN's, on maps of stride 16."""

import torchvision

import fastcv
from benchmarks import shapes
from benchmarks.harness import Case, as_test, backward, forward

LAYOUTS = {"channels-last": True, "contiguous": False}
EXTRA = {"ps_roi_align": (2,), "ps_roi_pool": ()}  # sampling ratio


def _case(name, what, k, size, layout, prepare=forward):
    def inputs():
        x = shapes.feature(size, channels_last=LAYOUTS[layout], grad=prepare is backward)
        return x, shapes.rois(k, largest=512), 7, 1 / 16, *EXTRA[name]

    return Case(
        name,
        f"{what}, {layout}",
        inputs,
        {
            "fastcv": prepare(getattr(fastcv.ops, name)),
            "torchvision": prepare(getattr(torchvision.ops, name)),
        },
    )


CASES = [
    case
    for name in EXTRA
    for layout in LAYOUTS
    for case in (
        _case(name, "R-FCN, 300 RoIs x 21 classes x 7x7, 38x63", 300, (1, 1029, 38, 63), layout),
        _case(name, "Light-Head R-CNN, 1000 RoIs x 10 x 7x7, 50x68", 1000, (1, 490, 50, 68), layout),
        _case(name, "1 RoI x 1 x 7x7, 50x68", 1, (1, 49, 50, 68), layout),
    )
]
# The gradients of ps_roi_pool differ (fastcv.interop.torchvision says how): nothing to compare.
CASES += [
    _case(
        "ps_roi_align", "backward, R-FCN, 300 RoIs x 21 classes x 7x7, 38x63", 300, (1, 1029, 38, 63), layout, backward
    )
    for layout in LAYOUTS
]

test_ps_roi_align = as_test(CASES)
