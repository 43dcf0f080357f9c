import math
import time
from functools import partial

import pytest
import torch
from roi_cases import FLOATS, FORMATS, TOLERANCE, compiled_only, one_thread, random_case

from fastcv import reference
from fastcv.ops import RoIAlign, roi_align

NAN, INF = math.nan, math.inf

forward_op = torch.ops.fastcv.roi_align.default
backward_op = torch.ops.fastcv.roi_align_backward.default


def check(features, boxes, size, scale=1.0, ratio=-1, aligned=False, grad=None, tolerance=None):
    """Forward and backward against the reference in float64."""
    x = features.detach().requires_grad_()
    pooled = roi_align(x, boxes, size, scale, ratio, aligned)
    assert pooled.dtype is features.dtype
    if grad is None:  # in the format of the output, as autograd's would be
        grad = torch.empty_like(pooled).copy_(torch.linspace(-1, 1, pooled.numel()).reshape(pooled.shape))
    (gradient,) = torch.autograd.grad(pooled, x, grad)
    assert gradient.dtype is features.dtype
    constants = (scale, *pooled.shape[2:])
    with one_thread():
        expected = reference.roi_align.roi_align(features.double(), boxes, *constants, ratio, aligned)
        expected_gradient = reference.roi_align.roi_align_backward(
            grad.double(), boxes, *constants, *features.shape, ratio, aligned
        )
    tolerance = tolerance or TOLERANCE[features.dtype]
    close = partial(torch.testing.assert_close, check_dtype=False, rtol=tolerance)
    close(pooled, expected, atol=min(tolerance, 1e-5))
    # A pixel's gradient is a sum over regions, rounded in float32 at least.
    close(gradient, expected_gradient, atol=min(tolerance, 1e-5) * max(1, len(boxes)))
    return pooled, gradient


# ---- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "size", "ratio", "aligned", "expected"),
    [
        # On the ramp 4y + x. Pixel centres at half-integers: each bin is the mean of the 2 x 2 pixels it covers.
        ([0, 0, 4, 4], 2, -1, True, [2.5, 4.5, 10.5, 12.5]),
        # Centres at integers: samples at 0.5, 1.5, 2.5 and 3.5, which is past the last centre and counts as 3.
        ([0, 0, 4, 4], 2, -1, False, [5, 6.75, 12, 13.75]),
        # The left half is outside and counts as 0; the other bin has its sample at (2, 2).
        ([-4, 0, 4, 4], (1, 2), 1, False, [0, 10]),
        # Columns -1 and 1: a sample on the border of -1 counts as column 0; just beyond, as nothing.
        ([-2, 0, 2, 4], 1, 2, False, [8.5]),
        ([-2.1, 0, 2, 4], 1, 2, False, [(8 + 0.975) / 2]),
        # Column 4, one past the last, still counts as the last; 4.5 does not.
        ([3, 0, 5, 4], 1, 1, False, [11]),
        ([3.5, 0, 5.5, 4], 1, 1, False, [0]),
        # A point is a region of one pixel where not aligned, else empty; a fixed grid samples it all the same.
        ([1, 1, 1, 1], 1, -1, False, [7.5]),
        ([1, 1, 1, 1], 1, 0, True, [0]),
        ([1, 1, 1, 1], 1, 3, True, [2.5]),
        # Inverted: backwards with a fixed grid, nothing with an adaptive one.
        ([4, 4, 0, 0], 2, 2, True, [12.5, 10.5, 4.5, 2.5]),
        ([4, 4, 0, 0], 2, 0, True, [0, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_by_hand(box, size, ratio, aligned, expected, memory_format):
    ramp = torch.arange(16.0).reshape(1, 1, 4, 4).expand(1, 3, 4, 4).contiguous(memory_format=memory_format)
    pooled = roi_align(ramp, torch.tensor([[0.0, *box]]), size, 1.0, ratio, aligned)
    for channel in pooled[0]:
        assert channel.flatten().tolist() == pytest.approx(expected)


def test_gradient_by_hand():
    x = torch.zeros(1, 1, 3, 4, requires_grad=True)
    # One sample at y = 1.5, x = 2.25.
    roi_align(x, torch.tensor([[0.0, 1.75, 1.0, 2.75, 2.0]]), 1, 1.0, 1).sum().backward()
    assert x.grad[0, 0].tolist() == [[0, 0, 0, 0], [0, 0, 0.375, 0.125], [0, 0, 0.375, 0.125]]


def test_spatial_scale_and_list_of_boxes():
    x = torch.arange(32.0).reshape(2, 1, 4, 4)
    expected = torch.tensor([2.5, 4.5, 10.5, 12.5]).reshape(1, 1, 2, 2)
    per_image = [torch.zeros(0, 4), torch.tensor([[0.0, 0, 64, 64]])]
    assert torch.equal(roi_align(x, per_image, 2, 1 / 16, aligned=True), expected + 16)
    assert torch.equal(roi_align(x, tuple(per_image[::-1]), (2, 2), 1 / 16, aligned=True), expected)
    assert roi_align(x, [torch.zeros(0, 4)] * 2, 2).shape == (0, 1, 2, 2)
    assert roi_align(x[:0], [], 2).shape == (0, 1, 2, 2)


def test_region_far_larger_than_the_map():
    # Samples a pixel apart, of which 9 x 8 lie between -1 and the end of the map.
    ones = torch.ones(1, 2, 8, 7, dtype=torch.float64)
    pooled = roi_align(ones, torch.tensor([[0, -1e6, -1e6, 1e6, 1e6]], dtype=torch.float64), 1)
    assert pooled.flatten().tolist() == pytest.approx([72 / 4e12] * 2)


# ---- against the reference -------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_shapes(dtype, memory_format):
    generator = torch.Generator().manual_seed(0)
    channels = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 70, 130)
    for i, c in enumerate(channels):
        n, h, w, size, ratio = (
            int(torch.randint(low, high, (), generator=generator))
            for low, high in ((1, 4), (1, 41), (1, 41), (1, 5), (-1, 3))
        )
        features, boxes = random_case(generator, n, c, h, w, i % 5, dtype)
        features = features.contiguous(memory_format=memory_format)
        check(features, boxes, (size, i % 3 + 1), (1.0, 0.5)[i % 2], ratio, aligned=i % 4 < 2)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty(shape):
    generator = torch.Generator().manual_seed(1)
    for k in (0, 3) if shape[0] else (0,):
        features, boxes = random_case(generator, *shape, k)
        pooled, gradient = check(features, boxes, (2, 3))
        assert pooled.shape == (k, shape[1], 2, 3)
        assert gradient.shape == shape
        assert not pooled.any()


def sliced(x):
    n, c, h, w = x.shape
    return x.new_full((n, 2 * c + 1, h + 3, 3 * w), NAN)[:, 1::2, 2 : 2 + h, ::3].copy_(x)


LAYOUTS = {
    "sliced": sliced,
    "channels-last, sliced": lambda x: sliced(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "channels expanded": lambda x: x[:, :1].expand(x.shape),
    "images and rows expanded": lambda x: x[:1, :, :1].expand(x.shape),
    "one number": lambda x: x[:1, :1, :1, :1].expand(x.shape),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "offset": lambda x: torch.cat([x.new_full((1,), NAN), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, dtype):
    features, boxes = random_case(torch.Generator().manual_seed(2), 2, 21, 13, 11, 7, dtype)
    boxes = torch.cat([boxes.new_full((7, 1), NAN), boxes], dim=1)[:, 1:]
    grad = torch.randn(7, 21, 3, 4, generator=torch.Generator().manual_seed(3)).to(dtype)
    check(LAYOUTS[layout](features), boxes, (3, 4), grad=LAYOUTS[layout](grad))
    columns = boxes.T.contiguous().T
    assert torch.equal(roi_align(features, columns, 3), roi_align(features, columns.contiguous(), 3))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_keeps_memory_format(memory_format):
    features, boxes = random_case(torch.Generator().manual_seed(4), 2, 5, 8, 9, 6)
    pooled, gradient = check(features.contiguous(memory_format=memory_format), boxes, 3)
    assert pooled.is_contiguous(memory_format=memory_format)
    assert gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("boxes_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_boxes_of_another_type(dtype, boxes_dtype):
    features, boxes = random_case(torch.Generator().manual_seed(5), 2, 10, 24, 20, 12, dtype, boxes_dtype)
    # Coordinates in float32 are off by about 1e-6 pixels, where neighbours differ by several units.
    exact = torch.float64 in (dtype, boxes_dtype)
    check(features, boxes, (7, 5), ratio=2, tolerance=max(TOLERANCE[dtype], 0 if exact else 2e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("side", "k", "scale"), [(150, 3, 0.1), (150, 20, 1.0), (8, 50, 1.0)])
def test_few_and_many_regions(side, k, scale, dtype):
    features, boxes = random_case(torch.Generator().manual_seed(6), 2, 20, side, side + 3, k, dtype)
    planar, _ = check(features, boxes, (3, 2), scale, 2)
    interleaved, _ = check(features.contiguous(memory_format=torch.channels_last), boxes, (3, 2), scale, 2)
    torch.testing.assert_close(planar, interleaved, rtol=TOLERANCE[dtype], atol=2e-6)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [-1, 0, 1, 2, 5, pytest.param(8, id="8, many")])
def test_sampling(ratio, aligned):
    features, boxes = random_case(torch.Generator().manual_seed(7), 2, 9, 30, 25, 12)
    inverted = boxes[:, [0, 3, 2, 1, 4]]
    for size in ((1, 1), (3, 2), (7, 7)):
        check(features, torch.cat([boxes, inverted]), size, 1.0, ratio, aligned)


def test_inverted_regions_with_many_samples_near_every_pixel():
    # A sample shares one of its pixels with the next: each must be listed once, or the lists outgrow their memory.
    features = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(8))
    for low, high in ((4.7, 60), (1.0, 57), (-3.0, 20)):
        boxes = torch.tensor([[0, high, high, low, low]], dtype=torch.float64).repeat(30, 1)
        check(features, boxes, 7, 1.0, 8, True, tolerance=1e-5)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_extreme_regions(ratio, aligned, memory_format):
    nothing = [
        [NAN, 0, 5, 5], [0, 0, 5, NAN], [INF, 0, INF, 5], [-INF, -INF, INF, INF], [0, 0, INF, 5], [-3e38, 0, 3e38, 5],
        [1e6, 1e6, 1e6 + 9, 1e6 + 9], [-1e9, 0, -1e8, 9], [0, 1e12, 9, 2e12], [1e12, 1e12, 1e12, 1e12],
    ]  # fmt: skip
    something = [[-1e12, -1e12, 1e12, 1e12], [0, 0, 1e12, 5], [-1e5, 2, 1e5, 7], [5, 5, 5, 5], [9, 9, -9, -9]]
    boxes = torch.tensor([[0, *box] for box in nothing + something])
    x = torch.rand(1, 11, 12, 10, generator=torch.Generator().manual_seed(9)).contiguous(memory_format=memory_format)
    x.requires_grad_()
    start = time.perf_counter()
    pooled = roi_align(x, boxes, 3, 1.0, ratio, aligned)
    (gradient,) = torch.autograd.grad(pooled.sum(), x)
    assert time.perf_counter() - start < 5
    assert not pooled[: len(nothing)].any()
    assert ((pooled >= 0) & (pooled <= 1.0001)).all()
    assert gradient.isfinite().all()


# ---- against torchvision ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_like_torchvision(dtype):
    tv = pytest.importorskip("torchvision").ops
    generator = torch.Generator().manual_seed(10)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-11}[dtype]
    for i in range(150):
        n, c, h, w, k, ph, pw = torch.randint(1, 13, (7,), generator=generator).tolist()
        features, boxes = random_case(generator, n, c, h, w, k - 1, dtype, dtype)
        ratio, aligned, scale = (-1, 0, 1, 2, 3)[i % 5], i % 2 == 0, (1.0, 0.25, 1.7)[i % 3]
        if ratio > 0 and i % 4 == 0:  # torchvision throws for inverted regions with adaptive sampling
            boxes = boxes[:, [0, 3, 2, 1, 4]]
        results = []
        for function in (roi_align, tv.roi_align):
            x = features.clone().contiguous(memory_format=FORMATS[i % 2]).requires_grad_()
            pooled = function(x, boxes, (ph, pw), scale, ratio, aligned)
            (gradient,) = torch.autograd.grad(pooled.square().sum(), x)
            results.append((pooled, gradient))
        for result, expected in zip(*results, strict=True):
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    assert repr(RoIAlign(7, 0.25, 2, True)) == repr(tv.RoIAlign(7, 0.25, 2, True))


# ---- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [-1.0, -0.5, 2.0, 7.0, 1e30, NAN, INF, -INF])
def test_batch_index_outside_raises(index):
    boxes = torch.tensor([[0.0, 0, 0, 4, 4], [index, 0, 0, 4, 4], [5.0, 0, 0, 4, 4]])
    with pytest.raises(RuntimeError, match=r"boxes: row 1 has batch index .*expected 0 to 1"):
        roi_align(torch.zeros(2, 3, 8, 9), boxes, 2)
    with pytest.raises(RuntimeError, match=r"boxes: row 1 has batch index .*expected 0 to 1"):
        backward_op(torch.zeros(3, 3, 2, 2), boxes, 1.0, 2, 2, 2, 3, 8, 9, -1, False)
    mapped = torch.func.vmap(lambda x: roi_align(x, boxes[:2], 2))
    with pytest.raises(RuntimeError, match="boxes: row 1 has batch index"):
        mapped(torch.zeros(4, 2, 3, 8, 9))


def test_batch_index_outside_raises_where_there_is_nothing_to_compute():
    boxes = torch.tensor([[1.0, 0, 0, 4, 4]])
    with pytest.raises(RuntimeError, match="boxes: row 0 has batch index"):
        roi_align(torch.zeros(1, 0, 8, 9), boxes, 2)
    with pytest.raises(RuntimeError, match="boxes: row 0 has batch index"):
        backward_op(torch.zeros(1, 3, 2, 2), boxes, 1.0, 2, 2, 0, 3, 8, 9, -1, False)


def test_batch_index():
    x = torch.arange(300.0).reshape(300, 1, 1, 1)
    assert roi_align(x, torch.tensor([[1.9, 0, 0, 1, 1]]), 1).item() == 1  # truncated
    # Half types have no 257: the index is put before the coordinates in a type that does.
    per_image = [torch.tensor([[0, 0, 1, 1]], dtype=torch.bfloat16)] * 300
    assert torch.equal(roi_align(x, per_image, 1), x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, "input: expected a Tensor, got list"),
        ({"input": torch.zeros(2, 3, 8, 9).int()}, TypeError, "input: expected float32.* got torch.int32"),
        ({"input": torch.zeros(3, 8, 9)}, ValueError, r"input: expected shape \[N, C, H, W\], got \[3, 8, 9\]"),
        ({"boxes": None}, TypeError, r"boxes: expected a Tensor \[K, 5\] or a list .* NoneType"),
        ({"boxes": torch.zeros(1, 5).long()}, TypeError, "boxes: expected float32.* got torch.int64"),
        ({"boxes": torch.zeros(1, 4)}, ValueError, r"boxes: expected shape \[K, 5\], got \[1, 4\]"),
        ({"boxes": torch.zeros(5)}, ValueError, r"boxes: expected shape \[K, 5\], got \[5\]"),
        ({"boxes": torch.zeros(1, 5, device="meta")}, ValueError, "boxes: expected the device of input, cpu, got meta"),
        ({"boxes": [torch.zeros(1, 4)]}, ValueError, "boxes: expected a list of 2 tensors, one per image, got 1"),
        ({"boxes": [torch.zeros(1, 4), 0]}, TypeError, r"boxes\[1\]: expected a Tensor, got int"),
        ({"boxes": [torch.zeros(1, 4), torch.zeros(1, 5)]}, ValueError, r"boxes\[1\]: expected shape \[L, 4\]"),
        ({"boxes": [torch.zeros(1, 4).int(), torch.zeros(1, 4)]}, TypeError, r"boxes\[0\]: expected float32.*int32"),
        ({"boxes": [torch.zeros(1, 4), torch.zeros(1, 4, device="meta")]}, ValueError, r"boxes\[1\]: expected the dev"),
        ({"output_size": 0}, ValueError, "output_size: expected an int or a pair of ints of at least 1, got 0"),
        ({"output_size": (2, -1)}, ValueError, r"output_size: .* got \(2, -1\)"),
        ({"output_size": (2, 2, 2)}, ValueError, r"output_size: .* got \(2, 2, 2\)"),
        ({"output_size": 2.5}, ValueError, "output_size: .* got 2.5"),
        ({"spatial_scale": "1"}, RuntimeError, "'spatial_scale'"),
        ({"sampling_ratio": 1.5}, RuntimeError, "'sampling_ratio'"),
    ],
)
def test_errors(change, error, message):
    arguments = {"input": torch.zeros(2, 3, 8, 9), "boxes": torch.zeros(1, 5), "output_size": 2, **change}
    with pytest.raises(error, match=message):
        roi_align(**arguments)


@compiled_only
@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        (forward_op, (torch.zeros(3, 8, 9), torch.zeros(1, 5), 1.0, 2, 2, -1, False), "inputs: expected 4-D maps"),
        (forward_op, (torch.zeros(1, 3, 8, 9), torch.zeros(1, 4), 1.0, 2, 2, -1, False), "boxes: expected shape"),
        (forward_op, (torch.zeros(1, 3, 8, 9), torch.zeros(1, 5), 1.0, 0, 2, -1, False), "output_size: expected at l"),
        (forward_op, (torch.zeros(1, 3, 8, 9), torch.zeros(1, 5), 1.0, 2, 2, 2**62, True), "sampling_ratio: expected"),
        (backward_op, (torch.zeros(1, 3, 2, 2), torch.zeros(1, 5), 1.0, 2, 3, 1, 3, 8, 9, -1, False), "grad: expected"),
    ],
)
def test_kernel_checks_what_memory_safety_needs(op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        op(*arguments)
