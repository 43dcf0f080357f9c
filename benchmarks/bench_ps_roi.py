"""ps_roi_align and ps_roi_pool: R-FCN's position-sensitive score maps, 21 classes x 7x7."""

import torchvision

import fastcv
from benchmarks import shapes
from benchmarks.harness import Case, as_test, backward, forward

LAYOUTS = {"channels-last": True, "contiguous": False}


def _case(operator, what, extra, layout, prepare=forward):
    def inputs():
        size = (1, 21 * 49, 50, 68)
        x = shapes.feature(size, channels_last=LAYOUTS[layout], grad=prepare is backward)
        return x, shapes.rois(300, largest=512), (7, 7), 1 / 16, *extra

    return Case(
        operator,
        f"{what}, {layout}",
        inputs,
        {
            "fastcv": prepare(getattr(fastcv.ops, operator)),
            "torchvision": prepare(getattr(torchvision.ops, operator)),
        },
        tolerance=1e-3,
    )


CASES = [
    case
    for operator, extra in (("ps_roi_align", (2,)), ("ps_roi_pool", ()))
    for layout in LAYOUTS
    for case in (
        _case(operator, "300 RoIs x 21 x 7x7, R-FCN", extra, layout),
        _case(operator, "backward, 300 RoIs x 21 x 7x7", extra, layout, backward),
    )
]

test_ps_roi = as_test(CASES)
