"""The operators, with the names and signatures of ``torchvision.ops``."""

from .nms import PaddedDetections, batched_nms, nms, nms_padded
from .null import null as null  # a template, not one of torchvision's names: not in __all__

__all__ = ["PaddedDetections", "batched_nms", "nms", "nms_padded"]
