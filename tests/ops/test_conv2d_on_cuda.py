"""Triton's conv2d and conv_transpose2d on CUDA tensors: types, layouts, 64-bit offsets, parts of the depth, arguments.

They are called themselves, as on a GPU tensors that backends move there lose their strides.
"""

import importlib
import os

import pytest
import torch
import torch.nn.functional as F
from conv_cases import FORMATS, ON_TRITON, error

from fastcv import ops
from fastcv._library import implementation, triton_kernel
from fastcv.ops._layouts import kept
from fastcv.reference.conv2d import ACTIVATIONS

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Of the largest output: what rounding it takes, and for float32 what sums take.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# images, channels, height, width, outputs, kernel, stride, padding, output padding, dilation, groups
SHAPES = [
    (2, 24, 9, 11, 40, (3, 3), 1, 1, 0, 1, 1),
    (1, 3, 15, 14, 20, (5, 5), 2, 2, 0, 1, 1),  # few channels
    (1, 33, 6, 7, 17, (1, 1), 1, 0, 0, 1, 1),  # none a multiple of a vector
    (1, 8, 9, 10, 6, (3, 2), (1, 2), (2, 0), 0, (2, 1), 2),
    (2, 16, 10, 11, 16, (3, 3), 2, 1, 1, 1, 16),  # depthwise
    (1, 6, 7, 9, 12, (2, 3), 1, (0, 1), 0, (1, 2), 6),
    (1, 256, 3, 3, 16, (3, 3), 1, 1, 0, 1, 1),  # in parts
    (1, 1, 9, 8, 1, (3, 3), 1, 1, 0, 1, 1),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pair(n):
    return [n, n] if isinstance(n, int) else list(n)


def geometry_of(transposed, shape):
    stride, padding, extra, dilation = map(pair, shape[6:10])
    return (shape[10], stride, padding, extra, dilation) if transposed else (shape[10], stride, padding, dilation)


def run(transposed, x, weight, bias, residual, shape, activation="none", prepared=None, kernel="auto"):
    launch = triton_kernel("conv_transpose2d" if transposed else "conv2d")
    geometry = geometry_of(transposed, shape)
    return launch(x, weight, bias, residual, prepared, *geometry, activation, 0.1, kernel)


def in_double(transposed, x, weight, bias, shape):
    stride, padding, extra, dilation, groups = shape[6:]
    double = x.double(), weight.double(), bias.double()
    if transposed:
        return F.conv_transpose2d(*double, stride, padding, extra, groups, dilation)
    return F.conv2d(*double, stride, padding, dilation, groups)


def case(shape, transposed, dtype=torch.float32, memory_format=torch.contiguous_format):
    """Arguments, and the sums with bias in double."""
    n, c, h, w, k, size, *_, groups = shape
    x = torch.randn(n, c, h, w).to(DEVICE, dtype).contiguous(memory_format=memory_format)
    filters = (c, k // groups) if transposed else (k, c // groups)
    weight, bias = torch.randn(*filters, *size).to(DEVICE, dtype), torch.randn(k).to(DEVICE, dtype)
    return x, weight, bias, in_double(transposed, x, weight, bias, shape)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_types(shape, dtype, transposed):
    for memory_format in FORMATS:
        x, weight, bias, expected = case(shape, transposed, dtype, memory_format)
        residual = torch.randn(expected.shape).to(x).contiguous(memory_format=memory_format)
        actual = run(transposed, x, weight, bias, residual, shape, "silu")
        assert actual.dtype == dtype and actual.device == x.device
        assert actual.is_contiguous(memory_format=torch._prims_common.suggest_memory_format(x))
        assert error(actual, F.silu(expected + residual)) < TOLERANCES[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_in_double(activation):
    shape = (1, 16, 6, 7, 8, (1, 1), 1, 0, 0, 1, 1)
    x, weight, bias, expected = case(shape, False, torch.float64)
    x[0, :, 2, 3] = bias[:] = 0.0
    x[0, :, 2, 4], x[0, :, 3, 3] = x[0, :, 2, 4] * 1e-5, x[0, :, 3, 3] * 1e3  # series, and overflow
    expected = ACTIVATIONS[activation](F.conv2d(x, weight, bias), 0.1)
    actual = run(False, x, weight, bias, None, shape, activation)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_of_64_bits(transposed, monkeypatch):
    from fastcv.triton_kernels import _convolution, conv2d

    monkeypatch.setattr(_convolution, "is_wide", lambda problem: True)
    monkeypatch.setattr(conv2d, "plan", conv2d.plan.__wrapped__)
    for shape in (SHAPES[0], SHAPES[3], SHAPES[4], SHAPES[6]):
        for memory_format in FORMATS:
            x, weight, bias, expected = case(shape, transposed, memory_format=memory_format)
            residual = torch.randn(expected.shape).to(x)
            actual = run(transposed, x, weight, bias, residual, shape)
            assert error(actual, expected + residual) < 1e-5


@pytest.mark.parametrize("transposed", [False, True])
def test_images_far_apart(transposed):
    """More than 2^31 elements, of which a GPU alone has more than those that are used in memory."""
    for groups in (1, 16):
        shape = (2, 16, 5, 6, 16, (3, 3), 1, 1, 0, 1, groups)
        x, weight, bias, expected = case(shape, transposed, torch.float16)
        far = torch.empty(2**31 + 2**12, dtype=x.dtype, device=DEVICE).as_strided(x.shape, (2**31, 1, 96, 16))
        far.copy_(x)
        assert error(run(transposed, far, weight, bias, None, shape), expected) < 1e-3
        assert error(run(transposed, x, weight, bias, far, shape), expected + x) < 1e-3


@pytest.mark.parametrize("transposed", [False, True])
def test_any_strides(transposed):
    for shape in (SHAPES[1], SHAPES[3], SHAPES[4]):
        x, weight, bias, _ = case(shape, transposed)
        turned = torch.randn(x.shape[0], x.shape[3], x.shape[1], x.shape[2]).to(x).permute(0, 2, 3, 1)[:, :, ::2]
        for y in (x[:, :, 1::2, ::2], x[:1].expand(3, -1, -1, -1), x[..., :1].expand(-1, -1, -1, 9), turned):
            expected = run(transposed, y.contiguous(), weight, bias, None, shape)
            there = torch.randn(*expected.shape[:3], 3 * expected.shape[3]).to(x)[..., 1::3]
            expected = expected + there
            actual = run(transposed, y, weight.transpose(2, 3).contiguous().transpose(2, 3), bias, there, shape)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_prepared_weights_give_the_same(transposed):
    for shape in (SHAPES[0], SHAPES[1], SHAPES[3], SHAPES[5]):
        x, weight, bias, _ = case(shape, transposed)
        if transposed:
            prepared = triton_kernel("conv_transpose2d_prepare")(x, weight, *geometry_of(True, shape), "auto")
        else:
            prepared = triton_kernel("conv2d_prepare")(weight, *geometry_of(False, shape), "auto")
        expected = run(transposed, x, weight, bias, None, shape)
        assert torch.equal(run(transposed, x, weight, bias, None, shape, prepared=prepared), expected)
        with pytest.raises(RuntimeError, match="prepared"):
            run(transposed, x, weight, bias, None, shape, prepared=prepared[1:])


@pytest.mark.parametrize("transposed", [False, True])
def test_infinite_pixels_stay_in_their_groups(transposed):
    for shape in (SHAPES[0], SHAPES[3], SHAPES[4]):
        x, weight, bias, _ = case(shape, transposed)
        x[0, 0, 2, 3], x[0, 1, 4, 4] = float("inf"), float("nan")
        expected = in_double(transposed, x, weight, bias, shape)
        actual = run(transposed, x, weight, bias, None, shape)
        assert torch.equal(actual.isfinite(), expected.isfinite()) and actual.isfinite().any()


def test_tf32_where_it_is_allowed():
    x, weight, bias, expected = case(SHAPES[0], False)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert error(run(False, x, weight, bias, None, SHAPES[0]), expected) < 2e-3
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("transposed", [False, True])
def test_wrong_arguments(transposed):
    shape = (1, 4, 5, 5, 4, (3, 3), 1, 1, 0, 1, 1)
    x, weight, bias, _ = case(shape, transposed)
    residual = torch.ones(1, 4, 5, 5).to(x)

    def call(x=x, weight=weight, bias=bias, residual=residual, shape=shape, **options):
        return run(transposed, x, weight, bias, residual, shape, **options)

    call()
    for wrong, name in (
        (dict(kernel="winograd"), "kernel"),
        (dict(x=x[:, :3]), "input|weight"),
        (dict(x=x[0]), "input"),
        (dict(weight=weight[..., 0]), "weight"),
        (dict(weight=weight.double()), "weight"),
        (dict(bias=bias[:3]), "bias"),
        (dict(bias=bias.double()), "bias"),
        (dict(residual=residual[..., :4]), "residual"),
        (dict(residual=residual.double()), "residual"),
        (dict(activation="softsign"), "activation"),
        (dict(x=x[..., :0], shape=(*shape[:7], 0, *shape[8:])), "input"),
        (dict(shape=(*shape[:6], 0, *shape[7:])), "stride"),
        (dict(shape=(*shape[:6], 2**31, *shape[7:])), r"stride.*2\^31"),
        (dict(shape=(*shape[:7], -1, *shape[8:])), "padding"),
        (dict(shape=(*shape[:9], 2**31 - 1, 1)), "dilation"),
        (dict(shape=(*shape[:10], 3)), "weight"),
        (dict(shape=(*shape[:10], 0)), "groups"),
    ):
        with pytest.raises(RuntimeError, match=name):
            call(**wrong)


@pytest.mark.skipif(
    not ON_TRITON if DEVICE == "cpu" else implementation("conv2d", "cuda") != "triton",
    reason="on a GPU functions run on Triton's kernels with FASTCV_TRITON=all",
)
@pytest.mark.parametrize(("name", "theirs"), [("conv2d", F.conv2d), ("conv_transpose2d", F.conv_transpose2d)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions(name, theirs, dtype, monkeypatch):
    """What they add: weights prepared once, those that are trained at every call."""
    if DEVICE == "cpu":
        for module in ("conv2d", "conv_transpose2d", "_convolution"):
            module = importlib.import_module(f"fastcv.ops.{module}")
            monkeypatch.setattr(module, "on_kernels", lambda *tensors: False)
            monkeypatch.setattr(module, "on_triton", lambda kernel, *tensors: kernel == "auto")
    ours, x = getattr(ops, name), torch.randn(2, 32, 9, 9).to(DEVICE, dtype)
    weight = torch.randn(32, 32, 3, 3).to(DEVICE, dtype)
    double = x.double().requires_grad_()
    expected = F.silu(theirs(double, weight.double(), None, 1, 1))
    for _ in range(2):
        actual = ours(x, weight, None, 1, 1, activation="silu")
        assert error(actual, expected.detach()) < TOLERANCES[dtype]
    (layout,) = kept[id(weight)].layouts.values()
    assert layout.numel() == weight.numel()
    out = ours(x.requires_grad_(), weight, None, 1, 1, activation="silu")
    assert "Derivative" in type(out.grad_fn).__name__
    gradient, expected = torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(expected.sum(), double)[0]
    assert error(gradient, expected) < 10 * TOLERANCES[dtype]
    assert len(kept[id(weight)].layouts) == 2  # the other for the gradient
    trained, double = torch.nn.Parameter(weight), weight.double().requires_grad_()
    out = ours(x, trained, None, 1, 1, activation="relu")
    assert "Derivative" in type(out.grad_fn).__name__ and id(trained) not in kept
    expected = torch.autograd.grad(theirs(x.detach().double(), double, None, 1, 1).relu().sum(), double)[0]
    assert error(torch.autograd.grad(out.sum(), trained)[0], expected) < 10 * TOLERANCES[dtype]
