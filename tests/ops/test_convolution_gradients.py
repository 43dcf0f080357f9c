"""Gradients of convolutions as operators, and training on them: against float64, in all types and memory formats."""

import math

import pytest
import torch
import torch.nn.functional as F
from conv_cases import FORMATS, ON_TRITON, error
from torch.library import opcheck

from fastcv._library import triton_kernel
from fastcv.ops import _convolution
from fastcv.reference.conv2d import ACTIVATIONS

weight_gradient = torch.ops.fastcv.conv2d_weight_gradient
# Of the largest number: what rounding it takes, and for float32 what sums take.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# images, channels, height, width, outputs, kernel, stride, padding, dilation, groups
SHAPES = [
    (2, 24, 5, 7, 40, (3, 3), 1, 1, 1, 1),
    (2, 3, 15, 14, 20, (7, 7), 2, 3, 1, 1),  # few channels
    (1, 33, 6, 7, 17, (1, 1), 1, 0, 1, 1),  # none a multiple of a vector
    (1, 16, 9, 8, 16, (1, 1), (2, 3), 0, 1, 1),
    (1, 8, 9, 10, 6, (3, 2), (1, 2), (2, 0), (2, 1), 2),
    (2, 16, 10, 11, 16, (3, 3), 2, 1, 1, 16),  # depthwise
    (1, 6, 7, 9, 12, (2, 3), 1, (0, 1), (1, 2), 6),
    (1, 2, 9, 8, 2, (5, 4), 1, 1, 1, 2),  # more taps than a program has
    (1, 1, 4, 5, 1, (3, 3), 1, 2, 1, 1),
    (1, 2, 3, 2, 16, (3, 3), 3, 2, 2, 2),  # taps that are always outside
]
LONG = [(2, 4, 46, 46, 5, (3, 3), 1, 1, 1, 1), (2, 40, 33, 33, 40, (3, 3), 1, 1, 1, 40)]  # in parts


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pair(n):
    return [n, n] if isinstance(n, int) else list(n)


def geometry_of(shape):
    return shape[9], *map(pair, shape[6:9])


def case(shape, dtype=torch.float32):
    """``grad`` and input, and the weight's gradient in double."""
    n, c, h, w, k, size, *options, groups = shape
    x, weight = torch.randn(n, c, h, w).to(dtype), torch.zeros(k, c // groups, *size, dtype=torch.float64)
    out = F.conv2d(x.double(), weight.requires_grad_(), None, *options, groups)
    grad = torch.randn(out.shape).to(dtype)
    return grad, x, torch.autograd.grad(out, weight, grad.double())[0]


def run(grad, x, shape, channels_last=False):
    return weight_gradient(grad, x, list(shape[5]), *geometry_of(shape), channels_last)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_gradient(shape, dtype):
    grad, x, expected = case(shape, dtype)
    for memory_format in FORMATS:
        last = memory_format == torch.channels_last
        grad, x = grad.contiguous(memory_format=memory_format), x.contiguous(memory_format=memory_format)
        actual = run(grad, x, shape, last)
        assert actual.dtype == dtype and actual.is_contiguous(memory_format=memory_format)
        assert error(actual, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("shape", LONG, ids=str)
def test_long_sums_are_the_same_at_every_run(shape):
    grad, x, expected = case(shape)
    for memory_format in FORMATS:
        x = x.contiguous(memory_format=memory_format)
        actual = run(grad, x, shape, memory_format == torch.channels_last)
        assert error(actual, expected) < 1e-5
        again = [run(grad, x, shape, last) for last in (False, True)]
        assert torch.equal(actual, again[0]) and torch.equal(actual, again[1])


@pytest.mark.skipif(not ON_TRITON, reason="of Triton's kernels")
def test_offsets_of_64_bits(monkeypatch):
    from fastcv.triton_kernels import _weight_depthwise, _weight_gemm, _weight_gradient, convolution_gradients

    for module in (_weight_depthwise, _weight_gemm, _weight_gradient):
        monkeypatch.setattr(module, "is_wide", lambda problem, parts: True)
    monkeypatch.setattr(convolution_gradients, "plan", convolution_gradients.plan.__wrapped__)
    for shape in (SHAPES[0], SHAPES[4], SHAPES[5], LONG[0]):
        grad, x, expected = case(shape)
        for last, memory_format in enumerate(FORMATS):
            assert error(run(grad, x.contiguous(memory_format=memory_format), shape, bool(last)), expected) < 1e-5


@pytest.mark.skipif(not ON_TRITON, reason="of Triton's kernels")
def test_division_of_pixels():
    from fastcv.triton_kernels._weight_gradient import division

    for divisor in (1, 2, 3, 7, 68, 640, 1023, 1024, 1025, 99991, 2**29 - 1, 2**29 + 1, 2**30):
        factor, shift = division(divisor)
        assert factor < 2**31
        numbers = {m * divisor + d for m in (0, 1, 5, (2**30 - 1) // divisor) for d in (-1, 0, 1)} | {2**30 - 1}
        for n in numbers:
            assert not 0 <= n < 2**30 or (4 * n * factor >> 32) >> shift == n // divisor


@pytest.mark.skipif(not ON_TRITON, reason="of Triton's kernels")
def test_images_far_apart():
    """More than 2^31 elements, of which a GPU alone has more than those that are used in memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for groups in (1, 16):
        shape = (2, 16, 5, 6, 16, (3, 3), 1, 1, 1, groups)
        grad, x, expected = case(shape, torch.float16)
        far = torch.empty(2**31 + 2**12, dtype=x.dtype, device=device).as_strided(x.shape, (2**31, 1, 96, 16))
        kernel, options = triton_kernel("conv2d_weight_gradient"), ([3, 3], *geometry_of(shape), False)
        far.copy_(x)
        assert error(kernel(grad.to(device), far, *options).cpu(), expected) < 1e-3
        far.copy_(grad)
        assert error(kernel(far, x.to(device), *options).cpu(), expected) < 1e-3


@pytest.mark.skipif(not ON_TRITON, reason="of Triton's kernels")
def test_tf32_where_it_is_allowed():
    grad, x, expected = case(SHAPES[0])
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert error(run(grad, x, SHAPES[0]), expected) < 2e-3
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_any_strides():
    for shape in (SHAPES[1], SHAPES[4], SHAPES[5]):
        grad, x, _ = case(shape)
        wide = torch.randn(*grad.shape[:2], 2 * grad.shape[2], 3 * grad.shape[3])[:, :, ::2, 1::3]
        turned = torch.randn(x.shape[0], x.shape[3], x.shape[1], x.shape[2]).permute(0, 2, 3, 1)
        for g, y in ((wide, x), (grad, turned), (grad[:1].expand_as(grad), x[:, :1].expand_as(x))):
            expected = run(g.contiguous(), y.contiguous(), shape)
            torch.testing.assert_close(run(g, y, shape), expected, rtol=1e-4, atol=1e-4)


def test_infinite_pixels_stay_with_their_channels():
    for outputs, groups in ((6, 2), (4, 4)):
        shape = (1, 4, 5, 5, outputs, (3, 3), 1, 0, 1, groups)
        grad, x, _ = case(shape)
        x[0, 1, 2, 2], x[0, 3, 0, 0] = float("inf"), float("nan")
        finite, channels = run(grad, x, shape).isfinite(), 4 // groups
        corner = finite.flatten(2)[:, :, 1:].all(2)  # of which the first tap alone meets the corner
        for k in range(outputs):
            for c in range(channels):
                channel = k * groups // outputs * channels + c
                assert finite[k, c].all() == (channel not in (1, 3)) and corner[k, c] == (channel != 1)


@pytest.mark.parametrize("groups", [1, 4])
def test_empty_batch(groups):
    x, grad = torch.randn(0, 4, 5, 6), torch.randn(0, 8, 5, 6)
    actual = weight_gradient(grad, x, [3, 3], groups, [1, 1], [1, 1], [1, 1], False)
    assert torch.equal(actual, torch.zeros(8, 4 // groups, 3, 3))


def test_output_padding_above_the_stride():
    """Last rows and columns of the transposed convolution that no pixel reaches: ``grad`` lacks them."""
    x, weight = torch.randn(2, 3, 5, 4), torch.randn(3, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    out = F.conv_transpose2d(x.double(), weight, None, 1, (1, 3), (2, 1), 1, (3, 2))
    grad = torch.randn(out.shape)
    actual = weight_gradient(x, grad, [3, 2], 1, [1, 1], [1, 3], [3, 2], False)
    assert error(actual, torch.autograd.grad(out, weight, grad.double())[0]) < 1e-5


def test_wrong_arguments():
    grad, x = torch.randn(2, 6, 5, 7), torch.randn(2, 4, 5, 7)
    given = dict(grad=grad, input=x, size=[3, 3], groups=1, stride=[1, 1], padding=[1, 1], dilation=[1, 1])
    weight_gradient(**given, channels_last=False)
    for wrong, message in (
        (dict(grad=grad[0]), r"grad.*\[6, 5, 7\]"),
        (dict(grad=grad[:1]), "one N"),
        (dict(grad=grad[..., :6]), r"grad.*output.*\[2, 6, 5, 6\]"),
        (dict(grad=grad[..., :0]), "grad.*output"),
        (dict(input=x[..., :6]), "grad.*output"),
        (dict(grad=grad.double()), "grad.*torch.float64"),
        (dict(size=[0, 3]), r"size.*\[0, 3\]"),
        (dict(stride=[1, 0]), r"stride.*\[1, 0\]"),
        (dict(padding=[-1, 1]), r"padding.*\[-1, 1\]"),
        (dict(groups=3), "groups.*got 3"),
        (dict(groups=0), "groups.*got 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            weight_gradient(**{**given, **wrong}, channels_last=False)


def test_opcheck():
    shape = SHAPES[4]
    grad, x, _ = case(shape)
    opcheck(weight_gradient, (grad.requires_grad_(), x.requires_grad_(), list(shape[5]), *geometry_of(shape), True))


def test_derivatives_of_the_weight_gradient():
    grad = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)

    def f(grad, x):
        return weight_gradient(grad, x, [2, 2], 2, [1, 1], [0, 0], [2, 2], False)

    torch.autograd.gradcheck(f, (grad, x), check_forward_ad=True)
    torch.autograd.gradgradcheck(f, (grad, x))


def test_vmap():
    grad, x, _ = case((6, 4, 5, 6, 8, (3, 3), 1, 1, 1, 2))
    grads, inputs = grad.unflatten(0, (3, 2)), x.unflatten(0, (3, 2))
    shape = (2, *x.shape[1:], 8, (3, 3), 1, 1, 1, 2)
    actual = torch.func.vmap(lambda g, y: run(g, y, shape))(grads, inputs)
    expected = torch.stack([run(g, y, shape) for g, y in zip(grads, inputs, strict=True)])
    torch.testing.assert_close(actual, expected)


# ---- training ------------------------------------------------------------------------------------


def arguments(shape, transposed, output_padding=0, memory_format=torch.contiguous_format):
    """Tensors of a convolution with a residual, and what follows them."""
    n, c, h, w, k, size, stride, padding, dilation, groups = shape
    filters = (c, k // groups) if transposed else (k, c // groups)
    x, weight, bias = torch.randn(n, c, h, w), torch.randn(*filters, *size) / math.sqrt(c), torch.randn(k)
    geometry = (groups, *map(pair, (stride, padding, *[output_padding] * transposed, dilation)))
    residual = torch.randn(linear(transposed, x, weight, bias, geometry).shape)
    x, weight = x.contiguous(memory_format=memory_format), weight.contiguous(memory_format=memory_format)
    return [t.requires_grad_() for t in (x, weight, bias, residual)], geometry


def linear(transposed, x, weight, bias, geometry):
    groups, stride, padding, *extra, dilation = geometry
    if transposed:
        return F.conv_transpose2d(x, weight, bias, stride, padding, *extra, groups, dilation)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


@pytest.fixture
def all_on_triton(monkeypatch):
    """The operators of the CPU, Triton's or not, in the place of those on CUDA devices."""
    monkeypatch.setattr(_convolution, "on_triton", lambda kernel, *tensors: kernel == "auto")
    if ON_TRITON:

        def never(*_):
            raise AssertionError("torch's gradients")

        monkeypatch.setattr(torch.ops.aten, "convolution_backward", never)


# shape, output padding of the transposed convolution
TRAINED = [(SHAPES[0], 0), (SHAPES[4], (0, 1)), (SHAPES[5], 1), ((2, 4, 6, 3, 6, (3, 2), 1, (1, 2), (3, 2), 2), (2, 1))]


def operator(transposed):
    return torch.ops.fastcv.conv_transpose2d if transposed else torch.ops.fastcv.conv2d


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape, output_padding", TRAINED, ids=str)
def test_trained(shape, output_padding, transposed, all_on_triton):
    activations = "none", "relu", "leaky_relu", "relu6", "silu", "tanh"
    for memory_format, activation in zip(FORMATS * 3, activations, strict=True):
        tensors, geometry = arguments(shape, transposed, output_padding, memory_format)
        double = [t.detach().double().requires_grad_() for t in tensors]
        expected = ACTIVATIONS[activation](linear(transposed, *double[:3], geometry) + double[3], 0.1)
        out = operator(transposed)(*tensors, None, *geometry, activation, 0.1, "auto")
        v = torch.randn(out.shape).contiguous(memory_format=memory_format)
        actual, wanted = torch.autograd.grad(out, tensors, v), torch.autograd.grad(expected, double, v.double())
        for a, b, t in zip(actual, wanted, tensors, strict=True):
            assert error(a, b) < 2e-5 and a.shape == t.shape
        assert actual[1].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("transposed", [False, True])
def test_trained_parts(transposed, all_on_triton):
    """What needs no gradient has none, and gives the others the same."""
    tensors, geometry = arguments(TRAINED[1][0], transposed)
    everything = torch.autograd.grad(
        operator(transposed)(*tensors, None, *geometry, "relu", 0.0, "auto").sum(), tensors
    )
    for i, t in enumerate(tensors):
        alone = [u if u is t else u.detach() for u in tensors]
        out = operator(transposed)(*alone, None, *geometry, "relu", 0.0, "auto")
        torch.testing.assert_close(torch.autograd.grad(out.sum(), t)[0], everything[i], rtol=1e-5, atol=1e-5)
    tensors[2] = None
    out = operator(transposed)(*tensors, None, *geometry, "relu", 0.0, "auto")
    assert all(t.isfinite().all() for t in torch.autograd.grad(out.sum(), [t for t in tensors if t is not None]))


@pytest.mark.parametrize("transposed", [False, True])
def test_trained_on_no_images(transposed, all_on_triton):
    (x, weight, bias, residual), geometry = arguments(SHAPES[0], transposed)
    out = operator(transposed)(x[:0], weight, bias, residual[:0], None, *geometry, "relu", 0.0, "auto")
    d_x, *others = torch.autograd.grad(out.sum(), (x, weight, bias, residual))
    assert not any(d.any() for d in (d_x, *others))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", ["leaky_relu", "sigmoid"])
def test_trained_twice(activation, transposed, all_on_triton):
    tensors, geometry = arguments(TRAINED[3][0], transposed, (2, 1))
    double = [t.detach().double().requires_grad_() for t in tensors]
    u = [torch.randn(t.shape) for t in tensors]

    def second(tensors, out):
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum((a * b).sum() for a, b in zip(first, u, strict=True)), tensors)

    actual = second(tensors, operator(transposed)(*tensors, None, *geometry, activation, 0.1, "auto"))
    out = ACTIVATIONS[activation](linear(transposed, *double[:3], geometry) + double[3], 0.1)
    for a, b in zip(actual, second(double, out), strict=True):
        assert error(a, b) < 5e-5
