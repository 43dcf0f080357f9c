"""What layers keep of their weights is noticed to be old, however the weights are changed."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastcv


def upsample_conv(layer, x):
    return F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, layer.bias, padding=1)


# The layer, its weight, an input, and what it computes.
LAYERS = {
    "Conv2d": lambda: (
        fastcv.nn.Conv2d(64, 64, 3, padding=1),
        torch.randn(1, 64, 12, 12),
        lambda m, x: F.conv2d(x, m.weight, m.bias, padding=1),
    ),
    "ConvTranspose2d": lambda: (
        fastcv.nn.ConvTranspose2d(64, 64, 3, stride=2),
        torch.randn(1, 64, 6, 6),
        lambda m, x: F.conv_transpose2d(x, m.weight, m.bias, 2),
    ),
    "UpsampleConv2d": lambda: (fastcv.nn.UpsampleConv2d(32, 32), torch.randn(1, 32, 8, 8), upsample_conv),
    "Linear": lambda: (
        fastcv.nn.Linear(1024, 1100),
        torch.randn(6, 1024),
        lambda m, x: F.linear(x, m.weight, m.bias),
    ),
    "ConvNormAct": lambda: (
        fastcv.nn.ConvNormAct(fastcv.nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU()).eval(),
        torch.randn(1, 32, 12, 12),
        lambda m, x: m[2](m[1](F.conv2d(x, m[0].weight, m[0].bias))),
    ),
}


def weight_of(layer):
    return next(iter(layer.parameters()))


def assigned_twice(layer):
    for _ in range(2):  # the second may lie where the weights lay at first
        weight_of(layer).data = weight_of(layer).data * 1.5


def to_half_and_back(layer):
    layer.half()
    layer.float()


def turned_where_it_lies(layer):
    weight = weight_of(layer)
    if weight.dim() == 4:
        weight.data = weight.data.transpose(2, 3)


def scaled_in_place(layer):
    weight_of(layer).mul_(1.5)


@pytest.mark.parametrize("change", [assigned_twice, to_half_and_back, turned_where_it_lies, scaled_in_place])
@pytest.mark.parametrize("name", LAYERS)
def test_changes_are_noticed(name, change):
    torch.manual_seed(0)
    layer, x, formula = LAYERS[name]()
    with torch.no_grad():
        for _ in range(4):
            weight_of(layer).normal_()
            layer(x)
            change(layer)
            expected = formula(layer, x)
            torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_copies_hold_no_memory_of_the_original():
    layer, x, _ = LAYERS["ConvNormAct"]()
    with torch.no_grad():
        size = len(pickle.dumps(layer))
        expected = layer(x)
        assert len(pickle.dumps(layer)) == size
        assert torch.equal(copy.deepcopy(layer)(x), expected)
