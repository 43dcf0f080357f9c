"""conv2d_local: by hand, against shared convolution and the reference, derivatives, machinery, errors."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import fastcv
from fastcv import reference
from fastcv._library import implementation

FORMATS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# images, channels, height, width, outputs, kernel, stride, padding, dilation
CASES = [
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 3, 7, 6, 5, (3, 3), (1, 1), (1, 1), (1, 1)),
    (5, 4, 7, 6, 6, (3, 2), (2, 1), (1, 2), (2, 3)),
    (1, 17, 5, 5, 9, (5, 1), (1, 2), (0, 0), (1, 1)),
    (3, 8, 6, 6, 4, (3, 3), (3, 3), (0, 0), (1, 1)),
    (18, 6, 4, 3, 17, (2, 3), (2, 2), (1, 1), (2, 1)),  # enough for a matrix unit
]


def case(number, dtype=torch.float64, memory_format=torch.contiguous_format):
    n, c, h, w, k, kernel, *geometry = CASES[number]
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(n, c, h, w, generator=generator, dtype=torch.float64)
    shared = torch.randn(k, c, *kernel, generator=generator, dtype=torch.float64)
    size = F.conv2d(x, shared, None, *geometry).shape[2:]
    weight = torch.randn(*size, k, c, *kernel, generator=generator, dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=memory_format), weight.to(dtype), [list(g) for g in geometry]


def close(actual, expected):
    tolerance = torch.finfo(actual.dtype).eps * (2 if actual.dtype.itemsize == 2 else 32)
    return ((actual.double() - expected).abs().max() <= tolerance * expected.abs().max()).item()


def test_by_hand():
    """Three inputs, two pixels with kernels (1, 2) and (3, 4): 1*1 + 2*2 and 3*2 + 4*3, bias 10 and 20."""
    x = torch.tensor([1.0, 2, 3]).reshape(1, 1, 1, 3)
    weight = torch.tensor([1.0, 2, 3, 4]).reshape(1, 2, 1, 1, 1, 2)
    out = fastcv.ops.conv2d_local(x, weight, torch.tensor([10.0, 20]).reshape(1, 1, 2))
    assert out.flatten().tolist() == [15, 38]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_equal_kernels_are_a_convolution(number):
    x, weight, geometry = case(number)
    shared = weight[0, 0].clone()
    out = fastcv.ops.conv2d_local(x, shared.expand_as(weight), None, *geometry)
    torch.testing.assert_close(out, F.conv2d(x, shared, None, *geometry))


@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype, memory_format, number):
    x, weight, geometry = case(number, dtype, memory_format)
    out = torch.ops.fastcv.conv2d_local(x, weight, *geometry)
    assert out.dtype == dtype and out.is_contiguous(memory_format=memory_format)
    assert close(out, reference.conv2d_local.conv2d_local(x.double(), weight.double(), *geometry))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    for name, other, size in (("input", weight, x.shape[2:]), ("weight", x, weight.shape[4:])):
        arguments = (list(size), *geometry)
        actual = getattr(torch.ops.fastcv, f"conv2d_local_{name}_backward")(grad, other, *arguments)
        oracle = getattr(reference.conv2d_local, f"conv2d_local_{name}_backward")
        assert actual.dtype == dtype and close(actual, oracle(grad.double(), other.double(), *arguments))


def test_many_images_in_parts():
    """More patches than are held at a time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 100, 3, 3, generator=generator)
    weight = torch.randn(1, 1, 3, 100, 3, 3, generator=generator)
    out = torch.ops.fastcv.conv2d_local(x, weight, [1, 1], [0, 0], [1, 1])
    assert close(out, torch.einsum("nchw,kchw->nk", x.double(), weight[0, 0].double())[..., None, None])
    gradient = torch.ops.fastcv.conv2d_local_weight_backward(out, x, [3, 3], [1, 1], [0, 0], [1, 1])
    assert close(gradient, torch.einsum("nkij,nchw->ijkchw", out.double(), x.double()))


def test_strides():
    x, weight, geometry = case(1, torch.float32)
    wide = torch.cat([x, x], 1)[:, ::2][:, :3].mT.contiguous().mT
    out = fastcv.ops.conv2d_local(wide, weight, None, *geometry)
    assert torch.equal(out, fastcv.ops.conv2d_local(wide.contiguous(), weight, None, *geometry))
    assert torch.equal(out, fastcv.ops.conv2d_local(wide, weight.mT.contiguous().mT, None, *geometry))


def test_empty():
    x, weight, geometry = case(1, torch.float32)
    x, weight = x[:0].requires_grad_(), weight.requires_grad_()
    out = fastcv.ops.conv2d_local(x, weight, None, *geometry)
    out.sum().backward()
    assert out.shape == (0, 5, 7, 6) and x.grad.shape == x.shape and not weight.grad.any()


def test_same_for_any_number_of_threads():
    x, weight, geometry = case(2, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
            out = fastcv.ops.conv2d_local(*leaves, None, *geometry)
            results.append((out, *torch.autograd.grad((out**2).sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_derivatives():
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(2, 2, 2, 2, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    leaves = (x, weight.requires_grad_(), bias)
    assert torch.autograd.gradcheck(fastcv.ops.conv2d_local, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fastcv.ops.conv2d_local, leaves)
    grad = torch.randn(2, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    one, none = [1, 1], [0, 0]
    for operator, other, size in (
        (torch.ops.fastcv.conv2d_local_input_backward, weight, [3, 2]),
        (torch.ops.fastcv.conv2d_local_weight_backward, x, [2, 1]),
    ):

        def f(g, o, operator=operator, size=size):
            return operator(g, o, size, one, none, one)

        assert torch.autograd.gradcheck(f, (grad, other), check_forward_ad=True)


def test_opcheck():
    for memory_format in FORMATS:
        x, weight, geometry = case(2, memory_format=memory_format)
        x, weight = x.requires_grad_(), weight.requires_grad_()
        opcheck(torch.ops.fastcv.conv2d_local, (x, weight, *geometry))
        grad = torch.ops.fastcv.conv2d_local(x, weight, *geometry).detach().requires_grad_()
        opcheck(torch.ops.fastcv.conv2d_local_input_backward, (grad, weight, [7, 6], *geometry))
        opcheck(torch.ops.fastcv.conv2d_local_weight_backward, (grad, x, [3, 2], *geometry))


def test_compile():
    x, weight, geometry = case(2)
    leaves = x.requires_grad_(), weight.requires_grad_()

    def f(x, weight):
        return fastcv.ops.conv2d_local(x, weight, None, *geometry)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*leaves), f(*leaves))
    for a, b in zip(*(torch.autograd.grad((g(*leaves) ** 2).sum(), leaves) for g in (compiled, f)), strict=True):
        torch.testing.assert_close(a, b)


def test_errors():
    x, weight, _ = case(1, torch.float32)
    f = fastcv.ops.conv2d_local
    for bad, error, match in (
        (lambda: f(x[0], weight), ValueError, "input: expected shape"),
        (lambda: f(x, weight[0]), ValueError, "weight: expected shape"),
        (lambda: f(x, weight), ValueError, r"weight: expected shape \[5, 4, K, 3, KH, KW\]"),
        (lambda: f(x[:, :, :2, :2], weight), ValueError, "weight: expected a kernel that fits"),
        (lambda: f(x, weight.double(), padding=1), TypeError, "weight: expected the dtype of input"),
        (lambda: f(x, weight, torch.zeros(5), padding=1), ValueError, "bias: expected shape"),
        (lambda: f(x, weight, stride=0), ValueError, "stride"),
        (
            lambda: torch.ops.fastcv.conv2d_local(x, weight, [1, 1], [0, 0], [1, 1]),
            RuntimeError,
            "weight: expected|einsum",
        ),
    ):
        with pytest.raises(error, match=match):
            bad()


def test_numbers_too_large():
    x, weight = torch.ones(1, 2, 5, 5), torch.ones(3, 3, 2, 2, 3, 3)
    one = [1, 1]
    with pytest.raises(ValueError, match=r"dilation: expected .* at most 2147483647"):
        fastcv.ops.conv2d_local(x, weight, dilation=2**62)
    if implementation("conv2d_local", "cpu") == "compiled":
        for huge in (2**31, 2**62, 2**63 - 1):
            for geometry in (([huge, 1], [0, 0], one), (one, [huge, 0], one), (one, [0, 0], [huge, huge])):
                with pytest.raises(RuntimeError, match=r"2\^31"):
                    torch.ops.fastcv.conv2d_local(x, weight, *geometry)


def test_vmap():
    x, weight = torch.randn(3, 2, 2, 5, 5), torch.randn(3, 3, 4, 2, 3, 3)
    f = fastcv.ops.conv2d_local
    gradient = torch.func.grad(lambda w, x: f(x, w).square().sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of torch's slow way
        for actual, expected in (
            (torch.func.vmap(f, (0, None))(x, weight), [f(s, weight) for s in x]),
            (torch.func.vmap(gradient, (None, 0))(weight, x), [gradient(weight, s) for s in x]),
        ):
            torch.testing.assert_close(actual, torch.stack(expected))
