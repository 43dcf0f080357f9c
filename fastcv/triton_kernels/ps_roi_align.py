"""Position-sensitive RoIAlign: the kernels of RoIAlign, where every bin has channels of its own.

Neighbouring bins and channels are in other planes and other places of the map, so each element that is read brings 32
bytes. R-FCN's 300 regions of 21 classes and 7 x 7 bins on a map of 1029 x 38 x 63 in float32: 9.9 MB in, 1.2 MB out,
3 us from memory; but 16 loads of 32 bytes for each of 0.3 M outputs, 158 MB from the second-level cache, 30 us.

For the gradient a tile belongs to one bin's channels, so that it adds at most one bin of each region.
"""

from __future__ import annotations

from ._roi_gradients import gather, variants
from ._rois import check_grad, check_own_channels, check_rois, empty_pooled
from .roi_align import forward_variant, pool


def ps_roi_align(input, boxes, spatial_scale, pooled_height, pooled_width, sampling_ratio):
    check_rois(boxes, pooled_height, pooled_width, sampling_ratio)
    channels = check_own_channels(input, pooled_height, pooled_width)
    output = empty_pooled(input, boxes, channels, pooled_height, pooled_width)
    pool(input, boxes, output, spatial_scale, sampling_ratio, True, own_channels=True)
    return output


def ps_roi_align_backward(
    grad, boxes, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width, sampling_ratio
):  # fmt: skip
    check_rois(boxes, pooled_height, pooled_width, sampling_ratio)
    check_grad(grad, boxes, channels, pooled_height, pooled_width, own_channels=True)
    return gather(
        grad, boxes, (batch_size, channels, height, width), spatial_scale, pooling="align",
        sampling_ratio=sampling_ratio, own_channels=True,
    )  # fmt: skip


_OWN = {"TO_AREA": None, "ALIGNED": True, "OWN_CHANNELS": True}
VARIANTS = [
    forward_variant("fp32", False, "300 regions of 21 x 7 x 7 x 38 x 63: 11 MB, 3 us, and 158 MB of sectors", **_OWN),
    forward_variant("fp16", True, "the same", **_OWN),
    variants("fp32", False, "the same: 11 MB, 3 us", ALIGNED=True, OWN_CHANNELS=True)[1],
]
