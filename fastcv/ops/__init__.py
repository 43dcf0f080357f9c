"""The operators, with the names and signatures of ``torchvision.ops``."""

from .nms import PaddedDetections, batched_nms, nms, nms_padded

__all__ = ["PaddedDetections", "batched_nms", "nms", "nms_padded"]
