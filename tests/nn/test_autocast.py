"""Layers with weights under autocast, behind torch's layers and in front: the types of torch, exacter results."""

import copy

import pytest
import torch
from torch import nn

import fastcv

LAYERS = {
    "Conv2d": (lambda: fastcv.nn.Conv2d(8, 8, 3), (2, 8, 9, 9)),
    "Conv2d, same": (lambda: fastcv.nn.Conv2d(8, 8, 4, padding="same"), (2, 8, 9, 9)),
    "Conv2d, wide": (lambda: fastcv.nn.Conv2d(64, 64, 3, padding=1), (8, 64, 34, 31)),
    "ConvTranspose2d": (lambda: fastcv.nn.ConvTranspose2d(8, 8, 3, stride=2), (2, 8, 9, 9)),
    "UpsampleConv2d": (lambda: fastcv.nn.UpsampleConv2d(8, 8, 3), (2, 8, 9, 9)),
    "LocallyConnected2d": (lambda: fastcv.nn.LocallyConnected2d(8, 8, 9, 3), (2, 8, 9, 9)),
    "ConvNormAct": (
        lambda: fastcv.nn.ConvNormAct(fastcv.nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)),
        (2, 8, 9, 9),
    ),
    "Linear": (lambda: fastcv.nn.Linear(32, 8), (5, 32)),
}


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_backward(name, dtype):
    torch.manual_seed(0)
    make, size = LAYERS[name]
    layer, x = make(), torch.randn(size).to(dtype).requires_grad_()
    double, in_double = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    expected = double(in_double)
    with torch.autocast("cpu", torch.bfloat16):
        result = layer(x)
    assert result.dtype == torch.bfloat16
    close(result, expected)
    v = torch.randn(result.shape)
    (result * v).sum().backward()
    (expected * v.double()).sum().backward()
    assert x.grad.dtype == dtype
    close(x.grad, in_double.grad)
    for mine, theirs in zip(layer.parameters(), double.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        close(mine.grad, theirs.grad)


@pytest.mark.parametrize("name", LAYERS)
def test_inference(name):
    torch.manual_seed(0)
    make, size = LAYERS[name]
    layer, x = make().eval(), torch.randn(size)
    with torch.inference_mode():
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            result = layer(x)
    assert result.dtype == torch.bfloat16
    close(result, expected.double())


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d", "UpsampleConv2d", "LocallyConnected2d"])
def test_compile(name):
    make, size = LAYERS[name]
    layer, x = make(), torch.randn(size)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        result = compiled(x)
    assert result.dtype == torch.bfloat16
    close(result, layer(x).double())


def test_what_has_a_type_of_its_own():
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastcv.ops.conv2d(x.double(), weight.double()).dtype == torch.float64
        assert fastcv.ops.conv2d(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
        residual = torch.randn(1, 2, 3, 3)
        assert fastcv.ops.conv2d(x.bfloat16(), weight, residual=residual).dtype == torch.bfloat16
        with pytest.raises(TypeError, match="input"):
            fastcv.ops.conv2d(x.int(), weight)
