"""roi_align_rotated, forward and with the gradient of the map, against its formula in torch, as no package has it."""

import torch
import torch.nn.functional as F

import fastcv
from benchmarks.harness import Case, as_test, backward, forward

SAMPLES = 2  # of a bin, along each axis


def _inputs(k: int, channels: int, size: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, size, size, generator=generator)
    scale = torch.tensor([size - 24.0, size - 24.0, 18.0, 18.0, 180.0])
    boxes = torch.rand(k, 5, generator=generator) * scale + torch.tensor([12.0, 12.0, 4.0, 4.0, -90.0])
    return x, boxes


def _in_torch(x, boxes, bins):
    """Samples of all regions by grid_sample, and their means."""
    cx, cy, width, height, angle = boxes[:, :, None, None].unbind(1)
    at = (torch.arange(bins * SAMPLES, device=x.device) + 0.5) / (bins * SAMPLES) - 0.5
    v, u = at[:, None] * height, at * width
    cos, sin = torch.deg2rad(angle).cos(), torch.deg2rad(angle).sin()
    places = torch.stack([(v * sin + u * cos + cx) / x.shape[3], (v * cos - u * sin + cy) / x.shape[2]], -1) * 2 - 1
    rows = places.flatten(0, 1)[None]  # of all regions below each other: one image, which is not copied
    samples = F.grid_sample(x, rows, padding_mode="border", align_corners=False)
    return F.avg_pool2d(samples, SAMPLES)[0].unflatten(1, (len(boxes), bins)).transpose(0, 1)


def _case(k, channels, size, bins, differentiate):
    what = f"{k} regions of {channels}x{size}x{size} to {bins}x{bins}"
    measure = backward if differentiate else forward
    contenders = {
        "fastcv": measure(lambda x, boxes: fastcv.ops.roi_align_rotated(x, [boxes], bins, 1.0, SAMPLES)),
        "torch": measure(lambda x, boxes: _in_torch(x, boxes, bins)),
    }

    def inputs():
        x, boxes = _inputs(k, channels, size)
        return x.requires_grad_(differentiate), boxes

    what = f"{what}, gradient" if differentiate else what
    return Case("roi_align_rotated", what, inputs, contenders, tolerance=1e-3)


CASES = [_case(k, 256, 64, 7, differentiate) for k in (50, 500) for differentiate in (False, True)]

test_roi_align_rotated = as_test(CASES)
