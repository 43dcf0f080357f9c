"""What the tests of deform_conv2d share."""

import torch
from torch import Tensor

import fastcv

reference = fastcv.reference.deform_conv2d
operator = torch.ops.fastcv.deform_conv2d
operator_backward = torch.ops.fastcv.deform_conv2d_backward
FORMATS = (torch.contiguous_format, torch.channels_last)


def random_arguments(
    seed=0, *, batch=2, channels=4, outputs=6, size=(7, 9), kernel=(3, 3), groups=1, offset_groups=1, masked=True,
    stride=(1, 1), padding=(1, 1), dilation=(1, 1), dtype=torch.float64, spread=1.5,
):  # fmt: skip
    """(input, weight, offset, mask, bias) and the constants of the operator."""
    g = torch.Generator().manual_seed(seed)
    out = [reference.output_size(*axis) for axis in zip(size, kernel, stride, padding, dilation, strict=True)]
    taps = kernel[0] * kernel[1]

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    mask = torch.rand(batch, offset_groups * taps, *out, generator=g, dtype=torch.float64).to(dtype)
    tensors = (
        normal(batch, channels, *size),
        normal(outputs, channels // groups, *kernel),
        normal(batch, 2 * offset_groups * taps, *out) * spread,
        mask if masked else mask.new_empty(0),
        normal(outputs),
    )
    return tensors, (*stride, *padding, *dilation, groups, offset_groups, masked)


def gradient_of(tensors, constants, seed=1):
    output = reference.deform_conv2d(*tensors, *constants)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)


def assert_near(result: Tensor, expected: Tensor, tolerance: float):
    """Compared with the largest number: sums of many products are near zero by chance."""
    assert result.shape == expected.shape
    scale = expected.detach().double().abs().max() if expected.numel() else 1
    torch.testing.assert_close(result.double(), expected.double(), rtol=0, atol=float(tolerance * scale) + 1e-30)
