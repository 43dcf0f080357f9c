"""Arguments reach the kernels in the schema's order.

The boxing macro of libtorch's stable ABI checks how many arguments a kernel takes, not their types
or order. So each operator is called with arguments that are all distinct (no two alike that could
change places unseen) and compared with its reference.
"""

import pytest
import torch

import fastcv
from fastcv import _library
from fastcv.ops._convolution import ACTIVATIONS
from fastcv.ops.conv2d import KERNELS

torch.manual_seed(0)
BOXES = torch.tensor([[0.0, 1, 10, 12], [1, 1, 11, 12], [2, 9, 12, 21], [30, 31, 40, 43]])
ROTATED = torch.tensor(
    [[4.0, 5, 9, 4, 20], [5, 5, 9, 4, 30], [5, 6, 9, 4, 25], [31, 30, 2, 4, 80]], dtype=torch.float64
)
SCORES = torch.tensor([0.9, 0.8, 0.7, 0.35])
CLASSES = torch.tensor([0, 0, 1, 0])
FEATURE = torch.randn(5, 24, 11, 13)
ROIS = torch.tensor([[0, 1.0, 2, 15, 19], [1, 3, 0, 21, 17], [1, 5, 6, 9, 12]])
TURNED = torch.tensor([[0, 9.0, 12, 15, 9, 20], [1, 14, 6, 9, 12, -70], [1, 5, 6, 9, 12, 200]])
BINS = (0.5, 2, 3)  # spatial_scale, pooled_height, pooled_width
SHAPE = (5, 24, 11, 13)
GRAD = torch.randn(3, 24, 2, 3)

ARGMAX = fastcv.reference.roi_pool.roi_pool(FEATURE, ROIS, *BINS)[1]
LEVELS = [FEATURE, torch.randn(5, 24, 6, 7)]
DEFORMED = (
    torch.randn(1, 56, 9, 11),  # input
    torch.randn(14, 8, 2, 2),  # weight
    torch.randn(1, 64, 10, 7),  # offset
    torch.randn(1, 32, 10, 7),  # mask
    torch.randn(14),  # bias
)
CONVOLUTION = (1, 2, 3, 4, 5, 6, 7, 8)  # strides, paddings, dilations, groups, offset_groups

GEOMETRY = ([2, 3], [4, 5], [6, 7])  # strides, paddings, dilations
WEIGHT, BIAS, RESIDUAL = torch.randn(8, 12, 2, 2), torch.randn(8), torch.randn(5, 8, 7, 6)
TRANSPOSED, TRANSPOSED_GEOMETRY = torch.randn(24, 4, 6, 7), ([3, 2], [10, 16], [1, 0], [5, 4])
TRANSPOSED_RESIDUAL = torch.randn(5, 8, 37, 17)

# kernel, stride, padding and dilation, each for rows and columns
POOLING, AVERAGING = (5, 4, 6, 7, 3, 2, 10, 9), (5, 4, 6, 7, 1, 2)
MAP = torch.randn(2, 3, 41, 43)
POOLED, SWITCHES = fastcv.reference.max_pool2d.max_pool2d(MAP, *POOLING, True, 1)
AVERAGED = fastcv.reference.avg_pool2d.avg_pool2d(MAP, *AVERAGING, True, True, 0)

CALLS = {
    "max_pool2d": [(MAP, *POOLING, True, 1), (MAP, *POOLING, False, 8), (MAP, *POOLING, True, 0)],
    "max_unpool2d": [(POOLED, SWITCHES, 41, 43, *POOLING, sum) for sum in (True, False)],
    "max_unpool2d_backward": [(MAP, SWITCHES, *POOLING, sum) for sum in (True, False)],
    "avg_pool2d": [(MAP, *AVERAGING, True, False, 0), (MAP, *AVERAGING, False, True, 11)],
    "avg_pool2d_backward": [(AVERAGED, 41, 43, *AVERAGING, False, 0), (AVERAGED, 41, 43, *AVERAGING, True, 11)],
    "adaptive_avg_pool2d": [(FEATURE, 3, 5)],
    "adaptive_avg_pool2d_backward": [(AVERAGED, 17, 9)],
    "adaptive_max_pool2d": [(FEATURE, 3, 5)],
    "conv2d": [
        (FEATURE, WEIGHT, BIAS, None, None, 2, *GEOMETRY, "silu", 0.3, "auto"),
        (FEATURE, WEIGHT, None, RESIDUAL, None, 2, *GEOMETRY, "leaky_relu", 0.3, "gemm"),
    ],
    "conv2d_prepare": [(WEIGHT, 2, *GEOMETRY, "gemm")],
    "conv2d_input_gradient": [(torch.randn(2, 3, 10, 7), torch.randn(3, 5, 3, 4), [1, 2], "gemm")],
    "conv2d_weight_gradient": [(torch.randn(5, 8, 7, 6), FEATURE, (2, 2), 2, *GEOMETRY, True)],
    "conv2d_kernel": [(FEATURE, WEIGHT, 2, *GEOMETRY)],
    "conv_transpose2d": [
        (FEATURE, TRANSPOSED, BIAS, None, None, 2, *TRANSPOSED_GEOMETRY, "silu", 0.3, "auto"),
        (FEATURE, TRANSPOSED, None, TRANSPOSED_RESIDUAL, None, 2, *TRANSPOSED_GEOMETRY, "leaky_relu", 0.3, "gemm"),
    ],
    "conv_transpose2d_prepare": [(FEATURE, TRANSPOSED, 2, *TRANSPOSED_GEOMETRY, "gemm")],
    "conv_transpose2d_kernel": [(FEATURE, TRANSPOSED, 2, *TRANSPOSED_GEOMETRY)],
    "gram_matrix": [(FEATURE, "positions")],
    "gram_matrix_backward": [(torch.randn(5, 24, 24), FEATURE, "elements")],
    "style_loss": [([FEATURE, GRAD], [torch.randn(5, 24, 24), torch.randn(1, 24, 24)], [0.5, 2.0])],
    "local_response_norm": [(FEATURE, 5, 0.25, 0.75, 2.0)],
    "local_response_norm_backward": [(torch.randn(SHAPE), FEATURE, 4, 0.25, 1.5, 2.0)],
    "interpolate": [
        (FEATURE, [17, 19], 1.6, 1.5, "bilinear", False),
        (FEATURE, [22, 39], 2.0, 3.0, "bed_of_nails", True),
    ],
    "interpolate_backward": [(FEATURE, [7, 8], 1.6, 1.7, "nearest", False)],
    "conv2d_local": [(FEATURE, torch.randn(7, 6, 8, 24, 2, 2), *GEOMETRY)],
    "conv2d_local_input_backward": [(RESIDUAL, torch.randn(7, 6, 8, 24, 2, 2), [11, 13], *GEOMETRY)],
    "conv2d_local_weight_backward": [(RESIDUAL, FEATURE, [2, 2], *GEOMETRY)],
    "null": [(FEATURE,)],
    "nms": [(BOXES, SCORES, 0.4, False), (BOXES, SCORES, 0.4, True)],
    "batched_nms": [(BOXES, SCORES, CLASSES, 0.4, False), (BOXES, SCORES, CLASSES, 0.05, True)],
    "nms_padded": [
        (BOXES[None], SCORES[None], CLASSES[None], 0.4, 5, 0.375, False),
        (BOXES[None], SCORES[None], None, 0.5, 2, 0.25, True),
        (BOXES[None], torch.stack([SCORES, SCORES.flip(0)])[None], None, 0.3, 7, 0.4, False),
    ],
    "soft_nms": [
        (BOXES, SCORES, CLASSES, 0.3, 0.6, 0.001, "linear"),
        (BOXES, SCORES, None, 0.3, 0.6, 0.4, "gaussian"),
    ],
    "matrix_nms": [
        (BOXES[None], SCORES[None], CLASSES[None], 1.5, False),
        (BOXES[None], SCORES[None], None, 2.5, True),
    ],
    "weighted_boxes_fusion": [
        (BOXES, SCORES, CLASSES, [3, 1], [0.5, 2.0], 0.4, 0.36, "avg", False),
        (BOXES, SCORES, CLASSES, [2, 2], [3.0, 2.0], 0.3, 0.1, "max", True),
    ],
    "box_iou_rotated": [(ROTATED[:2], ROTATED, True), (ROTATED, ROTATED[1:], False)],
    "nms_rotated": [(ROTATED, SCORES, CLASSES, 0.3), (ROTATED, SCORES, None, 0.6)],
    "match_boxes": [(BOXES[:3], BOXES, 0.7, 0.3, True), (BOXES[:3], BOXES, 0.5, 0.4, False)],
    "paste_masks_in_image": [(torch.rand(2, 1, 5, 7), torch.tensor([[1, 2, 8, 9], [-3, 0, 4, 30]]), 11, 13, 1)],
    "roi_pool": [(FEATURE, ROIS, *BINS)],
    "roi_pool_backward": [(GRAD, ROIS, ARGMAX, *BINS, *SHAPE)],
    "prroi_pool": [(FEATURE, ROIS, *BINS, 0), (FEATURE, ROIS, *BINS, 4)],
    "prroi_pool_backward": [(GRAD, ROIS, *BINS, *SHAPE, 0), (GRAD, ROIS, *BINS, *SHAPE, 1)],
    "roi_align_rotated": [(FEATURE, TURNED, *BINS, 4, True, False), (FEATURE, TURNED, *BINS, -1, False, True)],
    "roi_align_rotated_backward": [
        (GRAD, TURNED, *BINS, *SHAPE, 4, True, False),
        (GRAD, TURNED, *BINS, *SHAPE, 0, False, True),
    ],
    "ps_roi_align": [(FEATURE, ROIS, *BINS, 4), (FEATURE, ROIS, *BINS, -1)],
    "ps_roi_align_backward": [(GRAD[:, :4], ROIS, *BINS, *SHAPE, 4), (GRAD[:, :4], ROIS, *BINS, *SHAPE, -1)],
    "ps_roi_pool": [(FEATURE, ROIS, *BINS)],
    "ps_roi_pool_backward": [(GRAD[:, :4], ROIS, *BINS, *SHAPE)],
    "multiscale_roi_align": [(LEVELS, ROIS, [0.5, 0.25], 2, 3, 4, True, 9, 1)],
    "multiscale_roi_align_backward": [(GRAD, ROIS, [0.5, 0.25], 2, 3, 5, 24, [11, 6], [13, 7], 4, True, 9, 1)],
    "deform_conv2d": [(*DEFORMED, *CONVOLUTION, True), (*DEFORMED, *CONVOLUTION, False)],
    "deform_conv2d_backward": [(torch.randn(1, 14, 10, 7), *DEFORMED, *CONVOLUTION, True, 31)],
    "roi_align": [(FEATURE, ROIS, *BINS, 4, True), (FEATURE, ROIS, *BINS, -1, False)],
    "roi_align_backward": [
        (GRAD, ROIS, *BINS, *SHAPE, 4, True),
        (GRAD, ROIS, *BINS, *SHAPE, 0, False),
    ],
}


@pytest.mark.parametrize("name", sorted(_library.OPERATORS))
def test_operator(name):
    assert name in CALLS, f"add calls of {name} with distinct arguments to CALLS"
    if fastcv.build_info()["operators"][name]["cpu"] != "compiled":
        pytest.skip(f"{name} has no compiled kernel")
    for arguments in CALLS[name]:
        if name.endswith(("_prepare", "_kernel")):  # a layout and a choice of their own: they need only arrive
            getattr(torch.ops.fastcv, name)(*arguments)
            continue
        expected = _library.OPERATORS[name](*arguments)
        actual = getattr(torch.ops.fastcv, name)(*arguments)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_prepared_weights_arrive():
    if fastcv.build_info()["operators"]["conv2d"]["cpu"] != "compiled":
        pytest.skip("conv2d has no compiled kernel")
    prepared = torch.ops.fastcv.conv2d_prepare(WEIGHT, 2, *GEOMETRY, "gemm")
    rest = (2, *GEOMETRY, "relu", 0.3, "gemm")
    expected = torch.ops.fastcv.conv2d(FEATURE, WEIGHT, BIAS, None, None, *rest)
    assert torch.equal(torch.ops.fastcv.conv2d(FEATURE, WEIGHT, BIAS, None, prepared, *rest), expected)
    with pytest.raises(RuntimeError, match="prepared"):
        torch.ops.fastcv.conv2d(FEATURE, WEIGHT, BIAS, None, prepared[1:], *rest)
    outputs, _, *size = WEIGHT.shape
    code = [
        KERNELS.index("gemm"),
        ACTIVATIONS.index("relu"),
        2,
        *(n for pair in GEOMETRY for n in pair),
        outputs,
        *size,
    ]
    run = torch.ops.fastcv.conv2d_prepared
    assert torch.equal(run(FEATURE, prepared, BIAS, None, code, 0.3), expected)
    leaky = [code[0], ACTIVATIONS.index("leaky_relu"), *code[2:]]
    rest = (2, *GEOMETRY, "leaky_relu", 0.3, "gemm")
    expected = torch.ops.fastcv.conv2d(FEATURE, WEIGHT, None, RESIDUAL, prepared, *rest)
    assert torch.equal(run(FEATURE, prepared, None, RESIDUAL, leaky, 0.3), expected)


@pytest.mark.parametrize(
    ("place", "number"),
    [(0, 99), (0, -1), (0, 1), (1, 10), (1, -1), (2, 0), (2, 5), (3, 0), (5, -1), (7, 2**62), (9, 0), (9, 34), (10, 9)],
)
def test_codes_that_mean_no_convolution(place, number):
    if fastcv.build_info()["operators"]["conv2d"]["cpu"] != "compiled":
        pytest.skip("conv2d has no compiled kernel")
    prepared = torch.ops.fastcv.conv2d_prepare(WEIGHT, 2, *GEOMETRY, "gemm")
    outputs, _, *size = WEIGHT.shape
    code = [KERNELS.index("gemm"), 1, 2, *(n for pair in GEOMETRY for n in pair), outputs, *size]
    torch.ops.fastcv.conv2d_prepared(FEATURE, prepared, None, None, code, 0.3)
    code[place] = number
    with pytest.raises(RuntimeError):
        torch.ops.fastcv.conv2d_prepared(FEATURE, prepared, None, None, code, 0.3)
    with pytest.raises(RuntimeError, match="12 numbers"):
        torch.ops.fastcv.conv2d_prepared(FEATURE, prepared, None, None, code[1:], 0.3)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_arguments_are_distinct(name):
    """Two equal numbers of one type could hide a swap."""
    for arguments in CALLS[name]:
        for kind in (float, int):
            values = [value for value in arguments if type(value) is kind]
            assert len(values) == len(set(values)), (name, values)
