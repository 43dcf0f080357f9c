"""Layers with the names, arguments and state dicts of ``torch.nn``, on fastcv's operators."""

from .conv import Conv2d, ConvNormAct
from .local import LocallyConnected2d
from .normalization import LocalResponseNorm
from .style import GramMatrix, StyleLoss
from .upsampling import Upsample, UpsampleConv2d, UpsamplingBilinear2d, UpsamplingNearest2d

__all__ = [
    "Conv2d",
    "ConvNormAct",
    "GramMatrix",
    "LocalResponseNorm",
    "LocallyConnected2d",
    "StyleLoss",
    "Upsample",
    "UpsampleConv2d",
    "UpsamplingBilinear2d",
    "UpsamplingNearest2d",
]
