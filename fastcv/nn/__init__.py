"""Layers with the names, arguments and state dicts of ``torch.nn``, on fastcv's operators."""

from .conv import Conv2d, ConvNormAct, ConvTranspose2d
from .linear import Linear
from .pooling import AdaptiveAvgPool2d, AdaptiveMaxPool2d, AvgPool2d, MaxPool2d, MaxUnpool2d, SpatialPyramidPool2d

__all__ = [
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AvgPool2d",
    "Conv2d",
    "ConvNormAct",
    "ConvTranspose2d",
    "Linear",
    "MaxPool2d",
    "MaxUnpool2d",
    "SpatialPyramidPool2d",
]
