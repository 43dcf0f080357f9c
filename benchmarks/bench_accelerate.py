"""accelerate: whole models of torchvision, batch 1, random weights, as they are, channels-last, and accelerated."""

import copy

import torch
import torchvision

import fastcv
from benchmarks.harness import Case, as_test

CLASSIFIERS = (
    "alexnet vgg16 googlenet inception_v3 resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 mobilenet_v2 "
    "mobilenet_v3_large efficientnet_b0 shufflenet_v2_x1_0 squeezenet1_1 mnasnet1_0 regnet_y_1_6gf convnext_tiny"
)


def _model(name):
    torch.manual_seed(0)
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def _thunk(model, x):
    def call():
        with torch.inference_mode():
            return model(x)

    return call


def _channels_last(model, x):
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return _thunk(model, x.contiguous(memory_format=torch.channels_last))


def _agree(result, expected):
    assert (result - expected).abs().max() <= 1e-4 * expected.abs().max()


def _case(name):
    size = 299 if name == "inception_v3" else 224

    def inputs():
        return _model(name), torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))

    return Case(
        "accelerate",
        f"{name}, {size}x{size}",
        inputs,
        {
            "fastcv": lambda model, x: _thunk(fastcv.accelerate(model), x),
            "torch": _thunk,
            "torch, channels-last": _channels_last,
        },
        agree=_agree,
        quick=name in ("resnet18", "mobilenet_v2"),
    )


CASES = [_case(name) for name in CLASSIFIERS.split()]

test_accelerate = as_test(CASES)
