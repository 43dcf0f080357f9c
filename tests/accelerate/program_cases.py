"""What the tests of programs share: models, and how results are compared."""

import torch
import torch.nn.functional as F
from torch import nn


class Function(nn.Module):
    """A function after a convolution, and one before another, so that it lies inside a program."""

    def __init__(self, function, channels=12, out=12):
        super().__init__()
        self.first = nn.Conv2d(channels, 12, 1)
        self.last = nn.Conv2d(out, 5, 1) if out else nn.Identity()
        self.function = function
        if isinstance(function, nn.Module):
            self.layer = function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


class Skip(nn.Sequential):
    def forward(self, x):
        return F.relu(x + super().forward(x))


class Block(nn.Module):
    """As in ConvNeXt."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.wide, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)
        y = self.scale * y
        y += x
        return y


def assert_alike(fast, model, *inputs, tolerance=2e-5):
    """Twice each: the first call with a size plans for it."""
    with torch.inference_mode():
        for x in inputs:
            for _ in range(2):
                torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=tolerance)


def randomise_norms(model):
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return model


def programs(fast):
    return [p for part in fast.fastcv_report.parts for p in part.programs]
