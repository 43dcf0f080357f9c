"""Layers with the names, arguments and state dicts of ``torch.nn``, on fastcv's operators."""

from .conv import Conv2d, ConvNormAct
from .normalization import LocalResponseNorm
from .style import GramMatrix, StyleLoss

__all__ = ["Conv2d", "ConvNormAct", "GramMatrix", "LocalResponseNorm", "StyleLoss"]
