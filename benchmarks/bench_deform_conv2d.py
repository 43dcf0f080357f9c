"""deform_conv2d: the 3x3 layers of a ResNet, with masks (version 2) and without."""

import torch
import torchvision

import fastcv
from benchmarks import shapes
from benchmarks.harness import Case, as_test, backward, forward

LAYOUTS = {"channels-last": True, "contiguous": False}


def _inputs(channels, height, width, channels_last, masked, grad):
    generator = torch.Generator().manual_seed(1)

    def random(*size):
        return torch.randn(size, generator=generator).requires_grad_(grad)

    x = shapes.feature((1, channels, height, width), channels_last=channels_last, grad=grad)
    weight = random(channels, channels, 3, 3)
    mask = random(1, 9, height, width) if masked else None
    return x, random(1, 18, height, width), weight, None, (1, 1), (1, 1), (1, 1), mask


def _case(what, size, layout, masked=True, prepare=forward):
    return Case(
        "deform_conv2d",
        f"{what}, {layout}",
        lambda: _inputs(*size, LAYOUTS[layout], masked, prepare is backward),
        {
            "fastcv": prepare(fastcv.ops.deform_conv2d),
            "torchvision": prepare(torchvision.ops.deform_conv2d),
        },
        tolerance=1e-2,
    )


CASES = [
    case
    for layout in LAYOUTS
    for case in (
        _case("128 channels, 100x136", (128, 100, 136), layout),
        _case("256 channels, 50x68", (256, 50, 68), layout),
        _case("256 channels, 50x68, no mask", (256, 50, 68), layout, masked=False),
        _case("512 channels, 25x34", (512, 25, 34), layout),
        _case("16 channels, 8x8", (16, 8, 8), layout),
        _case("backward, 256 channels, 50x68", (256, 50, 68), layout, prepare=backward),
    )
]

test_deform_conv2d = as_test(CASES)
