"""Every operator in plain PyTorch: the specification, the fallback and the oracle of the tests."""

from . import adaptive_pool2d as adaptive_pool2d
from . import avg_pool2d as avg_pool2d
from . import box_iou_rotated as box_iou_rotated
from . import conv2d as conv2d
from . import conv2d_local as conv2d_local
from . import conv_transpose2d as conv_transpose2d
from . import convolution_gradients as convolution_gradients
from . import deform_conv2d as deform_conv2d
from . import gram_matrix as gram_matrix
from . import interpolate as interpolate
from . import local_response_norm as local_response_norm
from . import match_boxes as match_boxes
from . import matrix_nms as matrix_nms
from . import max_pool2d as max_pool2d
from . import nms as nms
from . import nms_rotated as nms_rotated
from . import null as null
from . import paste_masks_in_image as paste_masks_in_image
from . import prroi_pool as prroi_pool
from . import ps_roi_align as ps_roi_align
from . import ps_roi_pool as ps_roi_pool
from . import roi_align as roi_align
from . import roi_align_rotated as roi_align_rotated
from . import roi_pool as roi_pool
from . import soft_nms as soft_nms
from . import weighted_boxes_fusion as weighted_boxes_fusion
