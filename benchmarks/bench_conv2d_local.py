"""conv2d_local: DeepFace's three locally connected layers, against unfold and a batched matrix product in torch."""

import torch
import torch.nn.functional as F

import fastcv
from benchmarks.harness import Case, as_test, forward

# channels, height and width, outputs, kernel, stride
LAYERS = {"L4": (16, 63, 16, 9, 1), "L5": (16, 55, 16, 7, 2), "L6": (16, 25, 16, 5, 1)}


def _theirs(x, weight, stride):
    height, width, outputs, _, *kernel = weight.shape
    patches = F.unfold(x, kernel, stride=stride).permute(2, 1, 0)  # [OH * OW, C * KH * KW, N]
    result = torch.bmm(weight.reshape(height * width, outputs, -1), patches)
    return result.permute(2, 1, 0).unflatten(2, (height, width))


def _with_gradients(function):
    def prepare(x, weight, stride):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        return lambda: torch.autograd.grad(function(x, weight, stride).sum(), (x, weight))

    return prepare


def _ours(x, weight, stride):
    return fastcv.ops.conv2d_local(x, weight, None, stride)


def _case(name, layer, images, prepare, suffix=""):
    channels, size, outputs, kernel, stride = layer

    def inputs():
        generator = torch.Generator().manual_seed(0)
        out = (size - kernel) // stride + 1
        x = torch.randn(images, channels, size, size, generator=generator)
        return x, torch.randn(out, out, outputs, channels, kernel, kernel, generator=generator), stride

    shape = f"DeepFace {name}, {channels} x {size} x {size} to {outputs}, {kernel}x{kernel}/{stride}, batch {images}"
    contenders = {"fastcv": prepare(_ours), "torch": prepare(_theirs)}
    return Case("conv2d_local", shape + suffix, inputs, contenders, tolerance=1e-3)


CASES = [
    *(_case(name, layer, images, forward) for images in (1, 16) for name, layer in LAYERS.items()),
    *(_case(name, layer, 4, _with_gradients, ", forward and backward") for name, layer in LAYERS.items()),
]

test_conv2d_local = as_test(CASES)
