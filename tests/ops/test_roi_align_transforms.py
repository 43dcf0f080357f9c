"""roi_align under autograd, torch.func, the compiler, threads and 64-bit sizes; its values are in test_roi_align.py."""

import pytest
import torch
from roi_cases import FLOATS, FORMATS, TOLERANCE, compiled_only, random_case

from fastcv import reference
from fastcv.ops import RoIAlign, roi_align

forward_op = torch.ops.fastcv.roi_align.default
backward_op = torch.ops.fastcv.roi_align_backward.default


# ---- properties of the implementation ----------------------------------------------------------------


@compiled_only
@pytest.mark.parametrize("memory_format", FORMATS)
def test_equal_for_any_number_of_threads(memory_format):
    generator = torch.Generator().manual_seed(11)
    features, boxes = random_case(generator, 2, 37, 30, 31, 60)
    features = features.contiguous(memory_format=memory_format)
    grad = torch.randn(60, 37, 7, 7, generator=generator).contiguous(memory_format=memory_format)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            few = roi_align(features, boxes[:2], 2, 0.2)
            pooled = roi_align(features, boxes, 7)
            gradient = backward_op(grad, boxes, 1.0, 7, 7, *features.shape, -1, False)
            results.append((few, pooled, gradient))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def available_gigabytes():
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


@compiled_only
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(3, 8, 10_000, 9_000), (70_000, 8, 63, 62)])
def test_more_elements_than_32_bits_count(shape, memory_format):
    try:
        if available_gigabytes() < 12:
            pytest.skip("needs 12 GB of free memory")
    except OSError:
        pytest.skip("free memory is unknown here")
    # Only the end of the map is written, and only that is read.
    features = torch.empty(shape, dtype=torch.bfloat16, memory_format=memory_format)
    assert features.numel() > 2**31
    crop = torch.randn(1, 8, 32, 32, generator=torch.Generator().manual_seed(12)).bfloat16()
    features[-1:, :, -32:, -32:] = crop
    boxes = random_case(torch.Generator().manual_seed(13), 1, 8, 32, 32, 30)[1].clamp(8, 31)
    boxes[:, 0] = 0
    there = boxes.double() + torch.tensor([shape[0] - 1, *[shape[3] - 32, shape[2] - 32] * 2])
    expected = roi_align(crop, boxes, 3, 1.0, 2)
    tolerance = TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(roi_align(features, there, 3, 1.0, 2), expected, rtol=tolerance, atol=1e-5)


# ---- derivatives -------------------------------------------------------------------------------------


@pytest.fixture(params=FORMATS, ids=str)
def small(request):
    """Features and regions in float64, the function of the features, and its matrix."""
    features, boxes = random_case(torch.Generator().manual_seed(14), 2, 2, 4, 5, 3, torch.float64)
    features = features.contiguous(memory_format=request.param)
    return features, boxes, lambda x: roi_align(x, boxes, (2, 1), 0.9, 2, True)


def test_derivatives(small):
    features, boxes, function = small
    features.requires_grad_()
    everything = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(function, features, **everything)
    assert torch.autograd.gradgradcheck(function, features, check_fwd_over_rev=True, check_batched_grad=True)
    assert torch.autograd.gradcheck(lambda x: roi_align(x, boxes, 2), features, **everything)


def test_derivatives_by_transforms(small):
    features, boxes, function = small
    tangent = torch.linspace(-1, 1, features.numel(), dtype=torch.float64).view(features.shape)
    value, derivative = torch.func.jvp(function, (features,), (tangent,))
    torch.testing.assert_close(value, function(features))
    torch.testing.assert_close(derivative, function(tangent))  # linear
    _, pullback = torch.func.vjp(function, features)
    grad = value.cos()
    expected = reference.roi_align.roi_align_backward(grad, boxes, 0.9, 2, 1, *features.shape, 2, True)
    torch.testing.assert_close(pullback(grad)[0], expected)
    # The Hessian of half the sum of squares is the matrix squared.
    hessian = torch.func.hessian(lambda x: function(x).square().sum() / 2)(features)
    for jacobian in (torch.func.jacrev(function)(features), torch.func.jacfwd(function)(features)):
        matrix = jacobian.reshape(value.numel(), features.numel())
        torch.testing.assert_close(hessian.reshape(features.numel(), -1), matrix.T @ matrix)


@pytest.mark.parametrize(("x_dim", "boxes_dim"), [(0, None), (None, 0), (0, 0), (2, 1), (-1, -1), (4, None)])
def test_vmap(x_dim, boxes_dim):
    generator = torch.Generator().manual_seed(15)
    cases = [random_case(generator, 2, 3, 6, 7, 4, torch.float64) for _ in range(3)]
    x, boxes = (torch.stack(values) for values in zip(*cases, strict=True))
    x = x.movedim(0, x_dim) if x_dim is not None else x[0]
    boxes = boxes.movedim(0, boxes_dim) if boxes_dim is not None else boxes[0]

    def function(x, boxes):
        return roi_align(x, boxes, 2).square().sum((1, 2, 3))

    def both(x, boxes):
        return function(x, boxes), torch.func.grad(lambda x: function(x, boxes).sum())(x)

    results = torch.func.vmap(both, in_dims=(x_dim, boxes_dim))(x, boxes)
    for i in range(3):
        one_x = x if x_dim is None else x.select(x_dim, i)
        one_boxes = boxes if boxes_dim is None else boxes.select(boxes_dim, i)
        expected = both(one_x, one_boxes)
        torch.testing.assert_close((results[0][i], results[1][i]), expected)


def test_no_gradient_for_boxes():
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    boxes = torch.tensor([[0.0, 0, 0, 4, 4]], requires_grad=True)
    roi_align(x, boxes, 2).sum().backward()
    assert x.grad is not None
    assert boxes.grad is None
    with torch.inference_mode():
        assert not roi_align(x, boxes, 2).requires_grad


# ---- the dispatcher and the compiler -----------------------------------------------------------------


@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format):
    features, boxes = random_case(torch.Generator().manual_seed(16), 2, 3, 6, 7, 4, boxes_dtype=torch.float32)
    features = features.contiguous(memory_format=memory_format).requires_grad_()
    grad = torch.randn(4, 3, 2, 5).contiguous(memory_format=memory_format).requires_grad_()
    torch.library.opcheck(forward_op, (features, boxes, 0.5, 2, 5, 2, True))
    torch.library.opcheck(backward_op, (grad, boxes, 0.5, 2, 5, 2, 3, 6, 7, -1, False))


@pytest.mark.parametrize("dynamic", [True, False])
def test_compile(dynamic):
    torch._dynamo.reset()

    def function(x, boxes):
        return roi_align(x.relu(), boxes, 2)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    generator = torch.Generator().manual_seed(17)
    for shape, memory_format in (((2, 3, 8, 9, 5), FORMATS[0]), ((3, 4, 7, 6, 2), FORMATS[1])):
        features, boxes = random_case(generator, *shape)
        x = features.contiguous(memory_format=memory_format).requires_grad_()
        lists = [boxes[boxes[:, 0] == i, 1:] for i in range(shape[0])]
        for argument in (boxes, lists):
            pooled, expected = compiled(x, argument), function(x, argument)
            torch.testing.assert_close(pooled, expected)
            assert pooled.is_contiguous(memory_format=memory_format)
            gradients = [torch.autograd.grad(p.square().sum(), x)[0] for p in (pooled, expected)]
            torch.testing.assert_close(*gradients)


def test_export():
    k, h, w = (torch.export.Dim(name, min=2, max=100) for name in "khw")
    case = random_case(torch.Generator().manual_seed(18), 2, 3, 8, 9, 5)
    exported = torch.export.export(RoIAlign((2, 3), 0.5, 2), case, dynamic_shapes=({2: h, 3: w}, {0: k}))
    other = random_case(torch.Generator().manual_seed(19), 2, 3, 13, 5, 11)
    torch.testing.assert_close(exported.module()(*other), roi_align(*other, (2, 3), 0.5, 2))


@pytest.mark.parametrize("dtype", FLOATS)
def test_autocast_keeps_the_type_of_the_input(dtype):
    features, boxes = random_case(torch.Generator().manual_seed(20), 2, 3, 8, 9, 5, dtype, torch.float32)
    for boxes_dtype in FLOATS:
        expected = roi_align(features, boxes.to(boxes_dtype), 2)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(roi_align(features, boxes.to(boxes_dtype), 2), expected)


def test_layer():
    features, boxes = random_case(torch.Generator().manual_seed(21), 2, 3, 8, 9, 5)
    layer = RoIAlign((2, 3), spatial_scale=0.5, sampling_ratio=2, aligned=True)
    assert torch.equal(layer(features, boxes), roi_align(features, boxes, (2, 3), 0.5, 2, True))
    assert repr(layer) == "RoIAlign(output_size=(2, 3), spatial_scale=0.5, sampling_ratio=2, aligned=True)"
