"""Layers with the names, arguments and state dicts of ``torch.nn``, on fastcv's operators."""

from .conv import Conv2d, ConvNormAct, ConvTranspose2d
from .linear import Linear
from .local import LocallyConnected2d
from .normalization import LocalResponseNorm
from .pooling import AdaptiveAvgPool2d, AdaptiveMaxPool2d, AvgPool2d, MaxPool2d, MaxUnpool2d, SpatialPyramidPool2d
from .style import GramMatrix, StyleLoss
from .upsampling import Upsample, UpsampleConv2d, UpsamplingBilinear2d, UpsamplingNearest2d

__all__ = [
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AvgPool2d",
    "Conv2d",
    "ConvNormAct",
    "ConvTranspose2d",
    "GramMatrix",
    "Linear",
    "LocalResponseNorm",
    "LocallyConnected2d",
    "MaxPool2d",
    "MaxUnpool2d",
    "SpatialPyramidPool2d",
    "StyleLoss",
    "Upsample",
    "UpsampleConv2d",
    "UpsamplingBilinear2d",
    "UpsamplingNearest2d",
]
