"""Convolution layers against torch's: results, state dicts, modes, changed statistics."""

import copy

import pytest
import torch
from layer_cases import NEAR, check_convolution, pair, train_a_step
from torch import nn

import fastcv


@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=3, padding=1),
        dict(kernel_size=1, bias=False),
        dict(kernel_size=(3, 5), stride=2, padding=(1, 2), dilation=2),
        dict(kernel_size=3, padding=1, groups=4),
        dict(kernel_size=3, padding=1, padding_mode="reflect"),
        dict(kernel_size=3, padding=2, padding_mode="circular", stride=2),
        dict(kernel_size=4, padding="same"),
        dict(kernel_size=3, padding="same", padding_mode="replicate"),
        dict(kernel_size=5, padding="valid"),
    ],
)
def test_conv2d(options):
    mine, theirs = pair("Conv2d", 8, 12, **options)
    check_convolution(mine, theirs, torch.randn(2, 8, 11, 13, requires_grad=True))


@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=4, stride=2, padding=1),
        dict(kernel_size=2, stride=2, bias=False),
        dict(kernel_size=(3, 5), stride=(2, 3), padding=(1, 2), output_padding=(1, 0), dilation=2),
        dict(kernel_size=3, padding=1, groups=4),
    ],
)
def test_conv_transpose2d(options):
    mine, theirs = pair("ConvTranspose2d", 8, 12, **options)
    x = torch.randn(2, 8, 7, 6, requires_grad=True)
    expected = check_convolution(mine, theirs, x)
    if options.get("stride") == 2:
        size = [n + 1 for n in expected.shape[2:]]
        torch.testing.assert_close(mine(x, output_size=size), theirs(x, output_size=size), **NEAR)


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_training_step_is_seen_by_inference(name):
    mine, theirs = pair(name, 8, 8, 3, padding=1)
    train_a_step(mine, theirs, torch.randn(1, 8, 9, 9))


def block(norm, activation, bias=False):
    torch.manual_seed(1)
    conv = fastcv.nn.Conv2d(6, 10, 3, padding=1, bias=bias)
    layers = [conv] + [layer for layer in (norm, activation) if layer is not None]
    if norm is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        if norm.weight is not None:
            with torch.no_grad():
                norm.weight.normal_()
                norm.bias.normal_()
    return fastcv.nn.ConvNormAct(conv, norm, activation), nn.Sequential(*copy.deepcopy(layers))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["BatchNorm2d", "plain BatchNorm2d", "FrozenBatchNorm2d", None])
@pytest.mark.parametrize(
    "activation",
    [
        None,
        nn.ReLU(),
        nn.ReLU6(inplace=True),
        nn.LeakyReLU(0.3),
        nn.SiLU(),
        nn.Hardswish(),
        nn.Hardsigmoid(),
        nn.GELU(),
    ],
    ids=lambda a: type(a).__name__,
)
def test_conv_norm_act(norm, activation, bias):
    make = {
        "BatchNorm2d": lambda: nn.BatchNorm2d(10),
        "plain BatchNorm2d": lambda: nn.BatchNorm2d(10, affine=False),
        "FrozenBatchNorm2d": lambda: fastcv.ops.FrozenBatchNorm2d(10),
        None: lambda: None,
    }[norm]
    mine, theirs = block(make(), activation, bias)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 6, 8, 9)
    torch.testing.assert_close(mine(x), theirs(x), **NEAR)  # batch statistics, which move on
    mine.eval()
    theirs.eval()
    with torch.inference_mode():
        torch.testing.assert_close(mine(x), theirs(x), **NEAR)
        torch.testing.assert_close(mine(x), theirs(x), **NEAR)
    if norm == "BatchNorm2d":
        for layers in (mine, theirs):
            with torch.no_grad():
                layers[1].running_mean.add_(1)
        with torch.inference_mode():
            torch.testing.assert_close(mine(x), theirs(x), **NEAR)


def test_what_is_folded_is_kept():
    mine, _ = block(nn.BatchNorm2d(10), nn.ReLU())
    mine.eval()
    x = torch.randn(1, 6, 8, 9)
    with torch.inference_mode():
        mine(x)
        kept = mine._folded
        mine(x)
    assert mine._folded is kept
    copy.deepcopy(mine)(x)


def test_errors():
    with pytest.raises(TypeError, match="conv: expected a Conv2d, got Linear"):
        fastcv.nn.ConvNormAct(nn.Linear(2, 2))


def test_fake_tensors():
    """Weights are not laid out for them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    layers = fastcv.nn.Conv2d(8, 16, 3), fastcv.nn.ConvTranspose2d(16, 8, 2, 2), fastcv.nn.Linear(256, 2048)
    x = torch.zeros(1, 8, 10, 130)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(x)
        for layer in layers:
            x = layer(x)
    assert x.shape == (1, 8, 16, 2048)
