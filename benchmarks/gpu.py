"""Cases for a GPU: ``make bench-gpu``. The operators' shapes in detectors, and layers at batch 32 in bfloat16.

torch's convolutions are cuDNN's, in channels-last; its float32 is without TF32, which has another error.
"""

import torch
import torch.nn.functional as F
import torchvision

import fastcv
from benchmarks import shapes
from benchmarks.harness import Case, backward, forward

ops = fastcv.ops
torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True


def _pair(ours, theirs, name="torch", prepare=forward):
    return {"fastcv": prepare(ours), name: prepare(theirs)}


# ---- suppression and regions ---------------------------------------------------------------------


def _many(images: int, classes: int, n: int):
    boxes, scores = shapes.random_boxes(images * n)
    ids = shapes.classes(images * n, images * classes)
    return boxes, scores, ids, 0.5


SUPPRESSION = [
    Case("nms", f"{n:,} random boxes", lambda n=n: (*shapes.random_boxes(n), 0.5),
         _pair(ops.nms, torchvision.ops.nms, "torchvision"))
    for n in (1_000, 10_000, 100_000)
] + [
    Case("batched_nms", "16 images of 1,000 boxes, 80 classes", lambda: _many(16, 80, 1_000),
         _pair(ops.batched_nms, torchvision.ops.batched_nms, "torchvision")),
]  # fmt: skip


def _regions(channels_last: bool, grad: bool = False):
    x = shapes.feature((1, 256, 200, 272), channels_last=channels_last, grad=grad)
    return x, shapes.rois(1000), (7, 7), 0.25, 2, False


REGIONS = [
    Case("roi_align", f"{what}1000 RoIs x 256 x 7x7, {layout}", lambda f=f, p=prepare: _regions(f, p is backward),
         _pair(ops.roi_align, torchvision.ops.roi_align, "torchvision", prepare), tolerance=1e-3)
    for layout, f in (("channels-last", True), ("contiguous", False))
    for what, prepare in (("", forward), ("backward, ", backward))
]  # fmt: skip

# ---- layers --------------------------------------------------------------------------------------

# channels, size, outputs, kernel, stride, groups
LAYERS = {
    "VGG-16": [(64, 224, 64, 3, 1, 1), (128, 112, 128, 3, 1, 1), (256, 56, 256, 3, 1, 1), (512, 28, 512, 3, 1, 1)],
    "ResNet-50": [
        (3, 224, 64, 7, 2, 1), (64, 56, 64, 1, 1, 1), (64, 56, 64, 3, 1, 1), (64, 56, 256, 1, 1, 1),
        (256, 56, 128, 1, 1, 1), (128, 56, 128, 3, 2, 1), (128, 28, 512, 1, 1, 1), (512, 28, 256, 1, 1, 1),
        (256, 14, 256, 3, 1, 1), (256, 14, 1024, 1, 1, 1), (1024, 14, 512, 1, 1, 1), (512, 7, 512, 3, 1, 1),
    ],
    "MobileNet": [(32, 112, 32, 3, 1, 32), (96, 112, 96, 3, 2, 96), (144, 56, 144, 3, 1, 144)],
}  # fmt: skip


def _layer(channels, size, outputs, kernel, stride, groups, dtype):
    torch.manual_seed(0)
    x = torch.randn(32, channels, size, size, dtype=dtype)
    weight = torch.randn(outputs, channels // groups, kernel, kernel, dtype=dtype) / (kernel * channels**0.5)
    layout = {"memory_format": torch.channels_last}
    return x.contiguous(**layout), weight.contiguous(**layout), None, stride, kernel // 2, 1, groups


CONVOLUTIONS = [
    Case("conv2d", f"{net}, {layer[0]} to {layer[2]}, {layer[3]}x{layer[3]}/{layer[4]}, {layer[1]} pixels, {name}",
         lambda layer=layer, dtype=dtype: _layer(*layer, dtype),
         _pair(ops.conv2d, F.conv2d, "cuDNN"), tolerance=0.05 if dtype != torch.float32 else 1e-3)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))
    for net, layers in LAYERS.items()
    for layer in layers
]  # fmt: skip


def _map(*size, dtype=torch.bfloat16, grad=False):
    torch.manual_seed(0)
    return (torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_(grad),)


def _gram(x):
    x = x.flatten(2)
    return torch.bmm(x, x.mT) / (x.shape[1] * x.shape[2])


MAPS = [
    Case("max_pool2d", "2x2, 8x64x256x256", lambda: _map(8, 64, 256, 256),
         _pair(lambda x: ops.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 2))),
    Case("interpolate", "nearest x2, 8x256x100x136", lambda: _map(8, 256, 100, 136),
         _pair(lambda x: ops.interpolate(x, scale_factor=2), lambda x: F.interpolate(x, scale_factor=2))),
    Case("gram_matrix", "256 x 65536", lambda: _map(1, 256, 256, 256),
         _pair(lambda x: ops.gram_matrix(x), _gram, "cuBLAS"), tolerance=0.02),
]  # fmt: skip

CASES = SUPPRESSION + REGIONS + CONVOLUTIONS + MAPS
