"""interpolate: a decoder's doubling, a feature pyramid's merge, the enlargement of a segmentation; both directions."""

import torch
import torch.nn.functional as F

import fastcv
from benchmarks.harness import Case, as_test, backward, forward

# channels, height, width -> height, width
SHAPES = {
    "decoder": (64, 128, 128, 256, 256),
    "feature pyramid": (256, 50, 68, 100, 136),
    "21 classes": (21, 60, 80, 480, 640),
}


def _case(name, shape, mode, channels_last=False, prepare=forward):
    channels, height, width, *size = shape

    def inputs():
        x = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
        x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        return x.requires_grad_(prepare is backward), tuple(size), None, mode

    names = [mode, name, f"{channels} x {height} x {width} to {size[0]} x {size[1]}"]
    names += ["channels-last"] * channels_last + ["backward"] * (prepare is backward)
    contenders = {"fastcv": prepare(fastcv.ops.interpolate), "torch": prepare(F.interpolate)}
    return Case("interpolate", ", ".join(names), inputs, contenders)


CASES = [
    _case(name, shape, mode, channels_last, prepare)
    for prepare in (forward, backward)
    for mode in ("nearest", "bilinear")
    for channels_last in (False, True)
    for name, shape in SHAPES.items()
]

test_interpolate = as_test(CASES)
