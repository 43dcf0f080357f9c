"""conv_transpose2d: U-Net, Mask R-CNN's mask head, DCGAN's generator, DeconvNet, FCN, and bilinear upsampling.

Weights are prepared before, as they are kept between calls. torch runs in both memory formats; the ratio is to
the faster, the table has both.
"""

import torch
import torch.nn.functional as F

import fastcv
from benchmarks.harness import Case, as_test
from benchmarks.layouts import contenders

# images, channels, height, width, outputs, kernel, stride, padding, output padding, groups
LAYERS = {
    "U-Net": [
        (1, 1024, 28, 28, 512, 2, 2, 0, 0, 1),
        (1, 512, 56, 56, 256, 2, 2, 0, 0, 1),
        (1, 256, 100, 100, 256, 2, 2, 0, 0, 1),
    ],
    "Mask R-CNN": [(100, 256, 14, 14, 256, 2, 2, 0, 0, 1)],
    "DCGAN": [
        (16, 100, 1, 1, 512, 4, 1, 0, 0, 1),
        (16, 512, 8, 8, 256, 4, 2, 1, 0, 1),
        (16, 256, 16, 16, 128, 4, 2, 1, 0, 1),
        (16, 128, 32, 32, 64, 4, 2, 1, 0, 1),
        (16, 64, 32, 32, 3, 4, 2, 1, 0, 1),
    ],
    "decoder": [
        (1, 256, 64, 64, 128, 4, 2, 1, 0, 1),
        (1, 256, 28, 28, 256, 3, 2, 1, 1, 1),
        (1, 128, 56, 56, 64, 3, 2, 1, 1, 1),
        (1, 256, 32, 32, 128, 5, 2, 2, 1, 1),
    ],
    "DeconvNet": [
        (1, 512, 28, 28, 512, 3, 1, 1, 0, 1),
        (1, 256, 56, 56, 256, 3, 1, 1, 0, 1),
        (1, 64, 224, 224, 64, 3, 1, 1, 0, 1),
    ],
    "FCN": [
        (1, 21, 34, 34, 21, 4, 2, 0, 0, 1),
        (1, 21, 70, 70, 21, 16, 8, 0, 0, 1),
        (1, 21, 16, 16, 21, 64, 32, 0, 0, 1),
    ],
    "bilinear": [
        (1, 256, 64, 64, 256, 4, 2, 1, 0, 256),
        (1, 21, 16, 16, 21, 64, 32, 16, 0, 21),
    ],
}


def _case(model, layer):
    images, channels, height, width, outputs, kernel, stride, padding, output_padding, groups = layer

    def inputs():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(images, channels, height, width, generator=generator)
        weight = torch.randn(channels, outputs // groups, kernel, kernel, generator=generator)
        weight /= (channels // groups * kernel**2 / stride**2) ** 0.5
        bias = torch.randn(outputs, generator=generator)
        return x.contiguous(memory_format=torch.channels_last), weight, bias, stride, padding, output_padding, groups

    depth = ", depthwise" if groups > 1 else ""
    batch = f"{images} x " if images > 1 else ""
    shape = f"{model}, {channels} to {outputs} channels, {kernel}x{kernel}/{stride}{depth}, {batch}{height}x{width}"
    return Case(
        "conv_transpose2d",
        shape,
        inputs,
        contenders(fastcv.ops.conv_transpose2d, F.conv_transpose2d),
        tolerance=2e-4,
        quick=model in ("U-Net", "DCGAN"),
    )


CASES = [_case(model, layer) for model, layers in LAYERS.items() for layer in layers]

test_conv_transpose2d = as_test(CASES)
