"""Cases for a GPU: ``make bench-gpu``. The operators' shapes in detectors, and layers at batch 32 in bfloat16.

torch's convolutions are cuDNN's, in channels-last; its float32 is without TF32, which has another error.
"""

import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.detection import roi_heads

import fastcv
from benchmarks import (
    bench_box_iou_rotated,
    bench_match_boxes,
    bench_matrix_nms,
    bench_nms_padded,
    bench_prroi_pool,
    bench_ps_roi_align,
    bench_roi_pool,
    shapes,
)
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


def _pyramid():
    maps = {str(i): shapes.feature((1, 256, 800 // 4 >> i, 1088 // 4 >> i), channels_last=True) for i in range(4)}
    return maps, [shapes.clustered_boxes(1000, 60)[0]], [shapes.IMAGE]


def _deformable(grad: bool = False):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 256, 100, 136), torch.randn(256, 256, 3, 3) / 48
    offset, mask = torch.randn(2, 18, 100, 136), torch.rand(2, 9, 100, 136)
    return tuple(t.requires_grad_(grad) for t in (x, offset, weight, mask))


def _deform(function):
    return lambda x, offset, weight, mask: function(x, offset, weight, padding=1, mask=mask)


def _masks():
    torch.manual_seed(0)
    return torch.rand(100, 1, 28, 28), shapes.clustered_boxes(100, 100)[0], shapes.IMAGE


LEVELS = ["0", "1", "2", "3"]
REGIONS += [
    Case("multiscale_roi_align", "1000 RoIs on four levels, 256 x 7x7", _pyramid,
         _pair(ops.MultiScaleRoIAlign(LEVELS, 7, 2), torchvision.ops.MultiScaleRoIAlign(LEVELS, 7, 2), "torchvision"),
         tolerance=1e-3),
    Case("paste_masks_in_image", "100 masks, 800x1088", _masks,
         _pair(ops.paste_masks_in_image, roi_heads.paste_masks_in_image, "torchvision")),
] + [
    Case("deform_conv2d", f"{what}2x256x100x136 to 256, 3x3", lambda p=prepare: _deformable(p is backward),
         _pair(_deform(ops.deform_conv2d), _deform(torchvision.ops.deform_conv2d), "torchvision", prepare),
         tolerance=1e-3)
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


def _trained(layer, dtype, wanted: int):
    """The arguments of a layer, of which one needs its gradient."""
    arguments = _layer(*layer, dtype)
    arguments[wanted].requires_grad_()
    return arguments


def _agree(result, expected):
    for ours, theirs in zip(result, expected, strict=True):
        assert (ours - theirs).abs().max() <= (1e-4 if ours.dtype == torch.float32 else 0.01) * theirs.abs().max()


CONVOLUTIONS += [
    Case("conv2d", f"gradient of the {what}, {layer[0]} to {layer[2]}, {layer[3]}x{layer[3]}/{layer[4]}, "
         f"{layer[1]} pixels, {groups}{name}", lambda a=(layer, dtype, wanted): _trained(*a),
         _pair(ops.conv2d, F.conv2d, "cuDNN", backward), agree=_agree)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))
    for layer, groups in (
        (LAYERS["VGG-16"][0], ""), (LAYERS["VGG-16"][2], ""), (LAYERS["VGG-16"][3], ""), (LAYERS["ResNet-50"][0], ""),
        (LAYERS["ResNet-50"][3], ""), (LAYERS["ResNet-50"][5], ""), (LAYERS["ResNet-50"][11], ""),
        ((128, 56, 128, 3, 1, 32), "32 groups, "), (LAYERS["MobileNet"][1], "depthwise, "),
        (LAYERS["MobileNet"][2], "depthwise, "),
    )
    for what, wanted in (("input", 0), ("weight", 1))
]  # fmt: skip


def _block(channels: int, size: int):
    x, weight, *_ = _layer(channels, size, channels, 3, 1, 1, torch.bfloat16)
    return x, weight, torch.randn(channels, dtype=torch.bfloat16), torch.randn_like(x)


def _our_block(x, weight, shift, residual):
    return ops.conv2d(x, weight, shift, padding=1, residual=residual, activation="relu")


def _their_block(x, weight, shift, residual):
    return F.conv2d(x, weight, shift, padding=1).add_(residual).relu_()


def _transposed(channels: int, outputs: int, kernel: int, size: int):
    torch.manual_seed(0)
    x = torch.randn(16, channels, size, size, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    return (
        x,
        torch.randn(channels, outputs, kernel, kernel, dtype=torch.bfloat16) / channels**0.5,
        None,
        2,
        kernel // 2 - 1,
    )


CONVOLUTIONS += [
    Case("conv2d", f"{channels} channels, 3x3, {size} pixels, bias, residual and ReLU, bfloat16",
         lambda c=channels, s=size: _block(c, s), _pair(_our_block, _their_block, "cuDNN"), tolerance=0.05)
    for channels, size in ((64, 56), (256, 14))
] + [
    Case("conv_transpose2d", f"{c} to {k} channels, {n}x{n}/2, {size} pixels, bfloat16",
         lambda a=(c, k, n, size): _transposed(*a),
         _pair(ops.conv_transpose2d, F.conv_transpose2d, "cuDNN"), tolerance=0.05)
    for c, k, n, size in ((512, 256, 2, 32), (256, 128, 4, 32))
]  # fmt: skip


def _map(*size, dtype=torch.bfloat16, grad=False):
    torch.manual_seed(0)
    return (torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_(grad),)


def _gram(x):
    x = x.flatten(2)
    return torch.bmm(x, x.mT) / (x.shape[1] * x.shape[2])


def _our_pooling_and_back(x):
    values, indices = ops.max_pool2d(x, 2, return_indices=True, indices="compact")
    return ops.max_unpool2d(values, indices)


def _their_pooling_and_back(x):
    return F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)


MAPS = [
    Case("max_pool2d", "2x2, 8x64x256x256", lambda: _map(8, 64, 256, 256),
         _pair(lambda x: ops.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 2))),
    Case("max_unpool2d", "2x2 with its pooling, 8x64x256x256", lambda: _map(8, 64, 256, 256),
         _pair(_our_pooling_and_back, _their_pooling_and_back)),
    Case("interpolate", "bilinear x2, 8x256x100x136", lambda: _map(8, 256, 100, 136),
         _pair(lambda x: ops.interpolate(x, scale_factor=2, mode="bilinear"),
               lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")), tolerance=0.02),
    Case("local_response_norm", "32x96x55x55", lambda: _map(32, 96, 55, 55),
         _pair(lambda x: ops.local_response_norm(x, 5), lambda x: F.local_response_norm(x, 5)), tolerance=0.02),
    Case("interpolate", "nearest x2, 8x256x100x136", lambda: _map(8, 256, 100, 136),
         _pair(lambda x: ops.interpolate(x, scale_factor=2), lambda x: F.interpolate(x, scale_factor=2))),
    Case("gram_matrix", "256 x 65536", lambda: _map(1, 256, 256, 256),
         _pair(lambda x: ops.gram_matrix(x), _gram, "cuBLAS"), tolerance=0.02),
]  # fmt: skip

# The CPU's, where the others have kernels for GPUs too.
OTHERS = bench_nms_padded.CASES + bench_matrix_nms.CASES + bench_match_boxes.CASES
OTHERS += bench_box_iou_rotated.CASES + bench_prroi_pool.CASES
OTHERS += [case for case in bench_roi_pool.CASES + bench_ps_roi_align.CASES if "1 RoI" not in case.shape]

CASES = SUPPRESSION + REGIONS + CONVOLUTIONS + MAPS + OTHERS
