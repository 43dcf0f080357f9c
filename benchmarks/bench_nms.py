"""nms: sweeps of size, and Faster R-CNN's scale of overlap."""

import torchvision

import fastcv
from benchmarks import shapes
from benchmarks.harness import Case, as_test, forward

CONTENDERS = {
    "fastcv": forward(fastcv.ops.nms),
    "torchvision": forward(torchvision.ops.nms),
}

CASES = [
    Case(
        "nms",
        f"{n:,} random boxes",
        lambda n=n: (*shapes.random_boxes(n), 0.5),
        CONTENDERS,
        quick=n <= 10_000,
    )
    for n in (10, 100, 1_000, 10_000, 50_000)
] + [
    Case(
        "nms",
        f"{n:,} boxes on {objects} objects",
        lambda n=n, objects=objects: (*shapes.clustered_boxes(n, objects), 0.7),
        CONTENDERS,
    )
    for n, objects in ((2_000, 60), (10_000, 200))
]

test_nms = as_test(CASES)
