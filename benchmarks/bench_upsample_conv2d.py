"""upsample_conv2d: decoders of style transfer and generators, against upsampling, then convolution, channels-last."""

import torch
import torch.nn.functional as F

import fastcv
from benchmarks.harness import Case, as_test, forward

# channels, outputs, height and width before
SHAPES = [(128, 64, 64), (64, 32, 128), (256, 128, 32), (512, 256, 16)]


def _case(channels, outputs, size):
    def inputs():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, channels, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(outputs, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
        return x, weight.contiguous(memory_format=torch.channels_last), torch.randn(outputs, generator=generator)

    def separate(upsample, conv):
        return forward(lambda x, weight, bias: conv(upsample(x, scale_factor=2), weight, bias, padding=1))

    return Case(
        "upsample_conv2d",
        f"{channels} to {outputs} channels, 3x3, {size} x {size} to {2 * size} x {2 * size}",
        inputs,
        {
            "fastcv": forward(lambda *arguments: fastcv.ops.upsample_conv2d(*arguments)),
            "torch": separate(F.interpolate, F.conv2d),
            "fastcv, one after the other": separate(fastcv.ops.interpolate, fastcv.ops.conv2d),
        },
        tolerance=2e-4,
    )


CASES = [_case(*shape) for shape in SHAPES]

test_upsample_conv2d = as_test(CASES)
