"""The operators, with the names and signatures of ``torchvision.ops``."""

from .adaptive_pool2d import adaptive_avg_pool2d, adaptive_max_pool2d, spatial_pyramid_pool
from .avg_pool2d import avg_pool2d
from .blocks import (
    MLP,
    Conv2dNormActivation,
    Conv3dNormActivation,
    FrozenBatchNorm2d,
    Permute,
    SqueezeExcitation,
)
from .box_iou import box_iou, complete_box_iou, distance_box_iou, generalized_box_iou
from .box_losses import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss
from .boxes import (
    box_area,
    box_convert,
    clip_boxes_to_image,
    masks_to_boxes,
    remove_small_boxes,
)
from .conv2d import conv2d
from .conv2d_local import conv2d_local
from .conv_transpose2d import conv_transpose2d
from .deform_conv2d import DeformConv2d, deform_conv2d
from .feature_pyramid_network import FeaturePyramidNetwork
from .focal_loss import sigmoid_focal_loss
from .gram_matrix import gram_matrix, style_loss
from .interpolate import interpolate
from .local_response_norm import local_response_norm
from .match_boxes import match_boxes
from .matrix_nms import matrix_nms
from .max_pool2d import PooledIndices, max_pool2d
from .max_unpool2d import max_unpool2d
from .multiscale_roi_align import MultiScaleRoIAlign, multiscale_roi_align
from .nms import PaddedDetections, batched_nms, nms, nms_padded
from .nms_rotated import nms_rotated
from .null import null as null  # a template, not one of torchvision's names: not in __all__
from .paste_masks_in_image import paste_masks_in_image
from .prroi_pool import PrRoIPool, prroi_pool
from .ps_roi_align import PSRoIAlign, ps_roi_align
from .ps_roi_pool import PSRoIPool, ps_roi_pool
from .regularization import (
    DropBlock2d,
    DropBlock3d,
    StochasticDepth,
    drop_block2d,
    drop_block3d,
    stochastic_depth,
)
from .roi_align import RoIAlign, roi_align
from .roi_align_rotated import RoIAlignRotated, roi_align_rotated
from .roi_pool import RoIPool, roi_pool
from .soft_nms import soft_nms
from .upsample_conv2d import upsample_conv2d
from .weighted_boxes_fusion import weighted_boxes_fusion

__all__ = [
    "MLP",
    "Conv2dNormActivation",
    "Conv3dNormActivation",
    "DeformConv2d",
    "DropBlock2d",
    "DropBlock3d",
    "FeaturePyramidNetwork",
    "FrozenBatchNorm2d",
    "MultiScaleRoIAlign",
    "PSRoIAlign",
    "PSRoIPool",
    "PaddedDetections",
    "Permute",
    "PooledIndices",
    "PrRoIPool",
    "RoIAlign",
    "RoIAlignRotated",
    "RoIPool",
    "SqueezeExcitation",
    "StochasticDepth",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "batched_nms",
    "box_area",
    "box_convert",
    "box_iou",
    "clip_boxes_to_image",
    "complete_box_iou",
    "complete_box_iou_loss",
    "conv2d",
    "conv2d_local",
    "conv_transpose2d",
    "deform_conv2d",
    "distance_box_iou",
    "distance_box_iou_loss",
    "drop_block2d",
    "drop_block3d",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "gram_matrix",
    "interpolate",
    "local_response_norm",
    "masks_to_boxes",
    "match_boxes",
    "matrix_nms",
    "max_pool2d",
    "max_unpool2d",
    "multiscale_roi_align",
    "nms",
    "nms_padded",
    "nms_rotated",
    "paste_masks_in_image",
    "prroi_pool",
    "ps_roi_align",
    "ps_roi_pool",
    "remove_small_boxes",
    "roi_align",
    "roi_align_rotated",
    "roi_pool",
    "sigmoid_focal_loss",
    "soft_nms",
    "spatial_pyramid_pool",
    "stochastic_depth",
    "style_loss",
    "upsample_conv2d",
    "weighted_boxes_fusion",
]
