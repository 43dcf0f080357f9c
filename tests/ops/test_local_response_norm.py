"""local_response_norm: by hand, against float64 and torch, derivatives, machinery, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import fastcv
from fastcv import reference

FORMATS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 17, 4, 4), (3, 40, 1, 9), (1, 96, 27, 26), (2, 5, 19, 1), (1, 700, 3, 3)]
OPTIONS = [
    dict(size=5, alpha=1e-1, beta=0.75, k=2.0),
    dict(size=2, alpha=0.7, beta=0.5, k=1.0),
    dict(size=9, alpha=2.0, beta=1.0, k=0.5),
    dict(size=4, alpha=0.3, beta=1.3, k=1.5),
    dict(size=1, alpha=0.2, beta=0.0, k=1.0),
    dict(size=1500, alpha=3.0, beta=0.75, k=1.0),
]


def features(shape=(2, 5, 3, 4), dtype=torch.float64, memory_format=torch.contiguous_format, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    return x.to(dtype).contiguous(memory_format=memory_format)


def norm(x, size=3, alpha=0.9, beta=0.75, k=1.2):
    return fastcv.ops.local_response_norm(x, size, alpha, beta, k)


def test_by_hand():
    """Krizhevsky et al. 2012, section 3.3, k = 2, n = 3, alpha = 1 (times n, as torch divides), beta = 1/2."""
    x = torch.tensor([1.0, 2, 3, 4]).reshape(1, 4, 1, 1)
    expected = [1 / 7**0.5, 2 / 16**0.5, 3 / 31**0.5, 4 / 27**0.5]
    assert norm(x, 3, 3.0, 0.5, 2.0).flatten().tolist() == pytest.approx(expected)
    # An even window has one channel more before than after.
    expected = [1 / 1, 2 / 5, 3 / 13, 4 / 25]
    assert norm(x, 2, 2.0, 1.0, 0.0).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype, memory_format, options):
    for shape in SHAPES:
        x, grad = features(shape, dtype, memory_format), features(shape, dtype, memory_format, 1)
        out = norm(x, **options)
        assert out.dtype == dtype and out.is_contiguous(memory_format=memory_format)
        constants = options.values()
        assert close(out, reference.local_response_norm.local_response_norm(x.double(), *constants))
        gradient = torch.ops.fastcv.local_response_norm_backward(grad, x, *constants)
        assert gradient.is_contiguous(memory_format=memory_format)
        expected = reference.local_response_norm.local_response_norm_backward(grad.double(), x.double(), *constants)
        assert close(gradient, expected)


def close(actual, expected):
    return ((actual.double() - expected).abs().max() <= 8 * torch.finfo(actual.dtype).eps * expected.abs().max()).item()


@pytest.mark.parametrize("shape", [(2, 6, 7), (2, 6, 3, 4), (1, 6, 2, 3, 4)])
def test_like_torch(shape):
    x = features(shape)
    for options in OPTIONS[:4]:
        torch.testing.assert_close(norm(x, **options), F.local_response_norm(x, **options))
    torch.testing.assert_close(fastcv.ops.local_response_norm(x, 5), F.local_response_norm(x, 5))


def test_special_values():
    """What leaves the window leaves nothing behind."""
    x = torch.ones(1, 9, 1, 2)
    x[0, 1, 0, 0], x[0, 1, 0, 1], x[0, 8, 0, 1] = float("nan"), float("inf"), 1e18
    expected = F.local_response_norm(x, 3, beta=0.5)
    torch.testing.assert_close(fastcv.ops.local_response_norm(x, 3, beta=0.5), expected, equal_nan=True)
    assert expected[0, 3:7].isfinite().all()
    assert norm(torch.zeros(1, 2, 1, 1), k=0.0).isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 3, 3), (2, 3, 0, 4), (2, 3, 0)])
def test_empty(shape):
    x = torch.zeros(shape, requires_grad=True)
    out = norm(x)
    out.sum().backward()
    assert out.shape == x.grad.shape == shape


def test_strides():
    x = features((2, 20, 11, 18), torch.float32)
    for view in (x[:, ::2], x[..., ::3], x[:, :, 2:9, 1:5], x.transpose(2, 3), x[:1].expand(3, 20, 11, 18)):
        assert torch.equal(norm(view), norm(view.contiguous()))
        y, z = view.clone().requires_grad_(), view.contiguous().requires_grad_()
        norm(y).sum().backward()
        norm(z).sum().backward()
        assert torch.equal(y.grad, z.grad)


def test_same_for_any_number_of_threads():
    x = features((3, 64, 30, 31), torch.float32).requires_grad_()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = norm(x)
            results.append((out, *torch.autograd.grad(out.sum(), x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("beta", [0.75, 1.3])
def test_derivatives(beta):
    for memory_format in FORMATS:
        x = features((2, 5, 1, 2), memory_format=memory_format).requires_grad_()
        for size in (3, 4):

            def f(x, size=size):
                return norm(x, size, beta=beta)

            assert torch.autograd.gradcheck(f, x, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(f, x)
    grad = features((2, 5, 1, 2), seed=3).requires_grad_()
    operator = torch.ops.fastcv.local_response_norm_backward
    assert torch.autograd.gradcheck(lambda g, x: operator(g, x, 4, 0.9, beta, 1.2), (grad, x), check_forward_ad=True)
    assert torch.func.hessian(lambda x: norm(x).sum())(x).abs().sum() > 0


def test_opcheck():
    for memory_format in FORMATS:
        x = features(memory_format=memory_format).requires_grad_()
        opcheck(torch.ops.fastcv.local_response_norm, (x, 3, 0.5, 0.75, 2.0))
        grad = features(seed=1).requires_grad_()
        opcheck(torch.ops.fastcv.local_response_norm_backward, (grad, x, 3, 0.5, 0.75, 2.0))


def test_compile_vmap():
    x = features().requires_grad_()
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), norm(x))
    assert torch.equal(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, norm)))
    stacked = torch.stack([x, x + 1])
    assert torch.equal(torch.func.vmap(norm)(stacked), torch.stack([norm(s) for s in stacked]))
    gradient = torch.func.grad(lambda x: (norm(x) ** 2).sum())
    assert torch.equal(torch.func.vmap(gradient)(stacked), torch.stack([gradient(s) for s in stacked]))


def test_errors():
    x = torch.zeros(2, 3, 4, 5)
    for bad, error, match in (
        (lambda: norm(x[0, 0]), ValueError, "input: expected at least 3 dimensions"),
        (lambda: norm(x.int()), TypeError, "input"),
        (lambda: norm(x, 0), ValueError, "size: expected an int of at least 1, got 0"),
        (lambda: norm(x, 2.5), ValueError, "size"),
        (lambda: norm(x, beta="a"), TypeError, "beta: expected a number"),
        (
            lambda: torch.ops.fastcv.local_response_norm_backward(x[:1], x, 3, 1.0, 0.5, 2.0),
            RuntimeError,
            "grad: expected the shape of input|size of tensor",
        ),
    ):
        with pytest.raises(error, match=match):
            bad()
