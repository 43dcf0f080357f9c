"""box_iou of rotated boxes, against its formula in torch, as no package for torch's CPU has it."""

import torch

import fastcv
from benchmarks.bench_nms_rotated import rotated_boxes
from benchmarks.harness import Case, as_test, forward
from fastcv import reference


def _iou(n, m):
    def inputs():
        return rotated_boxes(n, 1000.0)[0], rotated_boxes(m, 1000.0)[0]

    def in_torch(a, b):
        return reference.box_iou_rotated.box_iou_rotated(a.double(), b.double(), torch.float32)

    contenders = {
        "fastcv": forward(lambda a, b: fastcv.ops.box_iou(a, b, "cxcywhr")),
        "torch": forward(in_torch),
    }
    return Case("box_iou", f"rotated, {n} x {m}", inputs, contenders)


CASES = [_iou(20000, 100), _iou(1000, 1000)]
test_box_iou_rotated = as_test(CASES)
