"""fastcv: hand-written kernels for PyTorch vision models, behind the names people already use."""

from . import nn, ops
from ._library import build_info
from .accelerate import accelerate, load_tuning, tune, whole_detector
from .interop import patch, patched, unpatch

__version__ = "0.1.0"

__all__ = [
    "accelerate",
    "build_info",
    "load_tuning",
    "nn",
    "ops",
    "patch",
    "patched",
    "tune",
    "unpatch",
    "whole_detector",
]
