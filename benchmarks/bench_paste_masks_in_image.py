"""paste_masks_in_image: the masks of Mask R-CNN's detections, 28 x 28, in images of several sizes."""

import torch
from torchvision.models.detection import roi_heads

import fastcv
from benchmarks import shapes
from benchmarks.harness import Case, as_test, forward


def _case(count, image):
    def inputs():
        boxes = shapes.clustered_boxes(count, count)[0] * (image[0] / shapes.IMAGE[0])
        place = boxes.clamp(min=0).minimum(torch.tensor([*image[::-1]] * 2))
        return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(0)), place, image

    contenders = {
        "fastcv": forward(fastcv.ops.paste_masks_in_image),
        "torchvision": forward(roi_heads.paste_masks_in_image),
    }
    return Case("paste_masks_in_image", f"{count} masks, {image[0]}x{image[1]}", inputs, contenders)


CASES = [_case(100, (480, 640)), _case(100, (800, 1088)), _case(10, (480, 640)), _case(1, (240, 320))]

test_paste_masks_in_image = as_test(CASES)
