"""conv2d: layers of VGG-16, ResNet-50, its feature pyramid at 800 pixels, ResNeXt and MobileNets, batch 1; training.

Weights are prepared before, as they are kept between calls. In training, forward and backward of 3x3 layers at batch 8,
they are prepared at every call. torch runs in both memory formats; the ratio is to the faster, the table has both.
"""

import torch
import torch.nn.functional as F

import fastcv
from benchmarks.harness import Case, as_test
from benchmarks.layouts import contenders

# channels, height, width, outputs, kernel, stride, padding, groups
LAYERS = {
    "VGG-16": [
        (64, 224, 224, 64, 3, 1, 1, 1),
        (64, 112, 112, 128, 3, 1, 1, 1),
        (128, 112, 112, 128, 3, 1, 1, 1),
        (128, 56, 56, 256, 3, 1, 1, 1),
        (256, 56, 56, 256, 3, 1, 1, 1),
        (256, 28, 28, 512, 3, 1, 1, 1),
        (512, 28, 28, 512, 3, 1, 1, 1),
        (512, 14, 14, 512, 3, 1, 1, 1),
    ],
    "ResNet-50": [
        (3, 224, 224, 64, 7, 2, 3, 1),
        (64, 56, 56, 64, 1, 1, 0, 1),
        (64, 56, 56, 64, 3, 1, 1, 1),
        (64, 56, 56, 256, 1, 1, 0, 1),
        (256, 56, 56, 64, 1, 1, 0, 1),
        (256, 56, 56, 128, 1, 1, 0, 1),
        (256, 56, 56, 512, 1, 2, 0, 1),
        (128, 56, 56, 128, 3, 2, 1, 1),
        (128, 28, 28, 128, 3, 1, 1, 1),
        (128, 28, 28, 512, 1, 1, 0, 1),
        (512, 28, 28, 128, 1, 1, 0, 1),
        (512, 28, 28, 256, 1, 1, 0, 1),
        (512, 28, 28, 1024, 1, 2, 0, 1),
        (256, 28, 28, 256, 3, 2, 1, 1),
        (256, 14, 14, 256, 3, 1, 1, 1),
        (256, 14, 14, 1024, 1, 1, 0, 1),
        (1024, 14, 14, 256, 1, 1, 0, 1),
        (1024, 14, 14, 512, 1, 1, 0, 1),
        (1024, 14, 14, 2048, 1, 2, 0, 1),
        (512, 14, 14, 512, 3, 2, 1, 1),
        (512, 7, 7, 512, 3, 1, 1, 1),
        (512, 7, 7, 2048, 1, 1, 0, 1),
        (2048, 7, 7, 512, 1, 1, 0, 1),
    ],
    "R50-FPN": [
        (3, 800, 1088, 64, 7, 2, 3, 1),
        (64, 200, 272, 64, 3, 1, 1, 1),
        (64, 200, 272, 256, 1, 1, 0, 1),
        (128, 100, 136, 128, 3, 1, 1, 1),
        (256, 50, 68, 256, 3, 1, 1, 1),
        (512, 25, 34, 512, 3, 1, 1, 1),
        (256, 200, 272, 256, 1, 1, 0, 1),
        (256, 200, 272, 256, 3, 1, 1, 1),
    ],
    "ResNeXt-50": [
        (128, 56, 56, 128, 3, 1, 1, 32),
        (256, 56, 56, 256, 3, 2, 1, 32),
        (256, 28, 28, 256, 3, 1, 1, 32),
        (512, 14, 14, 512, 3, 1, 1, 32),
        (1024, 7, 7, 1024, 3, 1, 1, 32),
    ],
    "MobileNet": [
        (3, 224, 224, 32, 3, 2, 1, 1),
        (32, 112, 112, 32, 3, 1, 1, 32),
        (96, 112, 112, 96, 3, 2, 1, 96),
        (144, 56, 56, 144, 3, 1, 1, 144),
        (192, 28, 28, 192, 3, 1, 1, 192),
        (576, 14, 14, 576, 3, 1, 1, 576),
        (960, 7, 7, 960, 3, 1, 1, 960),
        (672, 14, 14, 672, 5, 1, 2, 672),
        (16, 112, 112, 96, 1, 1, 0, 1),
        (96, 56, 56, 24, 1, 1, 0, 1),
        (144, 28, 28, 32, 1, 1, 0, 1),
        (960, 7, 7, 160, 1, 1, 0, 1),
    ],
}

# images, channels, height and width, outputs; 3x3, stride 1, padding 1
TRAINED = [
    (8, 64, 56, 64),
    (8, 128, 28, 128),
    (8, 256, 14, 256),
    (8, 512, 7, 512),
    (8, 64, 112, 128),
    (8, 256, 28, 512),
    (8, 512, 14, 512),
    (1, 256, 28, 256),
]


def _case(model, layer):
    channels, height, width, outputs, kernel, stride, padding, groups = layer

    def inputs():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, channels, height, width, generator=generator).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(outputs, channels // groups, kernel, kernel, generator=generator)
        bias = torch.randn(outputs, generator=generator)
        return x, weight / (channels // groups * kernel**2) ** 0.5, bias, stride, padding, 1, groups

    depth = f", {groups} groups" if 1 < groups < channels else ", depthwise" if groups > 1 else ""
    shape = f"{model}, {channels} to {outputs} channels, {kernel}x{kernel}/{stride}{depth}, {height}x{width}"
    return Case(
        "conv2d",
        shape,
        inputs,
        contenders(fastcv.ops.conv2d, F.conv2d),
        tolerance=2e-4,
        quick=model == "ResNet-50",
    )


def _step(conv, memory_format=torch.channels_last):
    """Forward and backward: the gradients of input, weight and bias."""

    def prepare(x, weight, bias):
        x, weight = (t.contiguous(memory_format=memory_format) for t in (x, weight))
        arguments = [t.detach().requires_grad_() for t in (x, weight, bias)]
        gradient = conv(*arguments, padding=1).detach()

        def call():
            return torch.autograd.grad(conv(*arguments, padding=1), arguments, gradient)

        return call

    return prepare


def _agree(result, expected):
    for ours, theirs in zip(result, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def _training_case(images, channels, size, outputs):
    def inputs():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(images, channels, size, size, generator=generator)
        weight = torch.randn(outputs, channels, 3, 3, generator=generator)
        return x, weight / (channels * 9) ** 0.5, torch.randn(outputs, generator=generator)

    steps = {
        "fastcv": _step(fastcv.ops.conv2d),
        "torch, channels-last": _step(F.conv2d),
        "torch, contiguous": _step(F.conv2d, torch.contiguous_format),
    }
    shape = f"training, batch {images}, {channels} to {outputs} channels, 3x3/1, {size}x{size}"
    return Case("conv2d", shape, inputs, steps, agree=_agree, quick=size == 56)


CASES = [_case(model, layer) for model, layers in LAYERS.items() for layer in layers]
CASES += [_training_case(*layer) for layer in TRAINED]

test_conv2d = as_test(CASES)
