"""Systems that torchvision does not have, written with ``torch.nn`` alone, as their users write them.

U-Net: Ronneberger, Fischer and Brox, "U-Net: convolutional networks for biomedical image segmentation", MICCAI 2015
(with padded convolutions and batch norm, as is usual now). DeconvNet: Noh, Hong and Han, "Learning deconvolution
network for semantic segmentation", ICCV 2015. DCGAN's generator: Radford, Metz and Chintala, "Unsupervised
representation learning with deep convolutional generative adversarial networks", ICLR 2016.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


def _convolutions(*channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """``[N, 3, H, W]`` to scores ``[N, classes, H, W]``; H and W are multiples of 16."""

    def __init__(self, classes: int = 2, channels: tuple[int, ...] = (64, 128, 256, 512, 1024)):
        super().__init__()
        pairs = list(itertools.pairwise(channels))
        self.first = _convolutions(3, channels[0], channels[0])
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), _convolutions(a, b, b)) for a, b in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in reversed(pairs))
        self.joined = nn.ModuleList(_convolutions(2 * a, a, a) for a, _ in reversed(pairs))
        self.scores = nn.Conv2d(channels[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        for up, joined in zip(self.up, self.joined, strict=True):
            x = joined(torch.cat([skips.pop(), up(x)], 1))
        return self.scores(x)


class DeconvNet(nn.Module):
    """``[N, 3, 224, 224]`` to scores ``[N, classes, 224, 224]``: VGG-16 without its last layer, and its mirror image of
    unpooling by the encoder's switches and transposed convolutions."""

    STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))

    def __init__(self, classes: int = 21):
        super().__init__()
        encoder, decoder, before = [], [], 3
        for channels, count in self.STAGES:
            encoder.append(_convolutions(before, *[channels] * count))
            last = before if before > 3 else channels
            decoder.insert(0, self._transposed(*[channels] * count, last))
            before = channels
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
        self.pool, self.unpool = nn.MaxPool2d(2, 2, return_indices=True), nn.MaxUnpool2d(2, 2)
        self.fc6 = nn.Sequential(nn.Conv2d(512, 4096, 7), nn.BatchNorm2d(4096), nn.ReLU(inplace=True))
        self.fc7 = nn.Sequential(nn.Conv2d(4096, 4096, 1), nn.BatchNorm2d(4096), nn.ReLU(inplace=True))
        self.fc6_deconv = self._transposed(4096, 512, kernel=7, padding=0)
        self.scores = nn.Conv2d(64, classes, 1)

    @staticmethod
    def _transposed(*channels: int, kernel: int = 3, padding: int = 1) -> nn.Sequential:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(channels):
            layers += [nn.ConvTranspose2d(a, b, kernel, 1, padding), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for stage in self.encoder:
            x, switches = self.pool(stage(x))
            kept.append(switches)
        x = self.fc6_deconv(self.fc7(self.fc6(x)))
        for stage in self.decoder:
            x = stage(self.unpool(x, kept.pop()))
        return self.scores(x)


class Generator(nn.Sequential):
    """DCGAN's, noise ``[N, 100, 1, 1]`` to images ``[N, 3, 64, 64]`` in [-1, 1]."""

    def __init__(self, noise: int = 100, channels: tuple[int, ...] = (1024, 512, 256, 128)):
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise((noise, *channels)):
            stride, padding = (1, 0) if a == noise else (2, 1)
            layers += [nn.ConvTranspose2d(a, b, 4, stride, padding, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]
        super().__init__(*layers, nn.ConvTranspose2d(channels[-1], 3, 4, 2, 1, bias=False), nn.Tanh())


def with_statistics(model: nn.Module) -> nn.Module:
    """Batch norms as after training, not trivial."""
    for module in model.modules():
        if type(module).__name__ in ("BatchNorm2d", "FrozenBatchNorm2d"):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The system in evaluation mode, and what it is called with."""
    system, shape = SYSTEMS[name]
    return with_statistics(system()).eval(), torch.randn(shape)


# By name: how each is built, and the shape of what it is called with.
SYSTEMS = {
    "unet 512x512": (UNet, (1, 3, 512, 512)),
    "deconvnet 224x224": (DeconvNet, (1, 3, 224, 224)),
    "dcgan generator, batch 16": (Generator, (16, 100, 1, 1)),
}
