"""avg_pool2d: by hand, against torch and the reference, derivatives, machinery, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import fastcv
from fastcv import reference
from fastcv.ops import _pooling, avg_pool2d
from fastcv.ops._pooling import window

FORMATS = (torch.contiguous_format, torch.channels_last)
TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CASES = [  # kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
    (2, None, 0, False, True, None),
    (2, None, 0, True, True, None),
    (3, 2, 1, True, False, None),
    (3, 1, 1, False, True, None),
    (3, 1, 1, False, False, None),
    ((3, 2), (1, 3), (1, 0), False, True, 3),
    (3, 3, 0, True, True, None),
    (5, 4, 2, True, True, None),
    (7, None, 0, False, True, -2),
]
SHAPES = [(2, 3, 9, 8), (1, 16, 7, 7), (1, 37, 8, 40), (0, 3, 8, 8), (2, 0, 8, 8)]


@pytest.fixture(autouse=True)
def own_kernels(monkeypatch):
    """Small maps would go to torch's (tests/ops/test_pooling_small_maps.py)."""
    monkeypatch.setattr(_pooling, "_MOST_BELOW", 0)


def normal(shape, dtype=torch.float32, memory_format=torch.contiguous_format, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=memory_format)


def test_by_hand():
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])[None, None]
    assert avg_pool2d(x, 2, 1)[0, 0].tolist() == [[3, 4], [6, 7]]
    assert avg_pool2d(x, 2, 2, 1)[0, 0].tolist() == [[0.25, 1.25], [2.75, 7]]
    assert avg_pool2d(x, 2, 2, 1, count_include_pad=False)[0, 0].tolist() == [[1, 2.5], [5.5, 7]]
    assert avg_pool2d(x, 2, ceil_mode=True)[0, 0].tolist() == [[3, 4.5], [7.5, 9]]
    assert avg_pool2d(x, 3, divisor_override=5).item() == 9


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case, dtype, memory_format):
    tolerance = 16 * torch.finfo(dtype).eps
    kernel, stride, padding, *rest = case
    w, divisor = window(kernel, stride, padding)[:6], rest[2] or 0
    for shape in SHAPES:
        x = normal(shape, dtype, memory_format)
        out = avg_pool2d(x, *case)
        oracle = reference.avg_pool2d.avg_pool2d(x.double(), *w, rest[0], rest[1], divisor)
        torch.testing.assert_close(out.double(), oracle, rtol=tolerance, atol=tolerance)
        if x.numel():  # torch takes no maps without channels; those have no memory format
            torch.testing.assert_close(oracle, F.avg_pool2d(x.double(), *case))
            assert out.is_contiguous(memory_format=memory_format)
        grad = normal(out.shape, dtype, memory_format, seed=1)
        gradient = torch.ops.fastcv.avg_pool2d_backward(grad, *shape[2:], *w, rest[1], divisor)
        oracle = reference.avg_pool2d.avg_pool2d_backward(grad.double(), *shape[2:], *w, rest[1], divisor)
        torch.testing.assert_close(gradient.double(), oracle, rtol=tolerance, atol=tolerance)
        assert gradient.shape == x.shape
        if x.numel() and out.shape[2:].numel() > 1:  # one pixel has no memory format
            assert gradient.is_contiguous(memory_format=memory_format)


def test_nan_stays_in_its_windows():
    x = torch.ones(1, 1, 4, 4)
    x[0, 0, 0, 0] = float("nan")
    assert avg_pool2d(x, 2).isnan().flatten().tolist() == [True, False, False, False]


def test_strided_and_unbatched():
    x = normal((2, 6, 20, 22))
    for view in (x[:, ::2], x[:, :, ::2], x[..., 1::2], x.transpose(2, 3), x[:1].expand(3, -1, -1, -1), x[0]):
        torch.testing.assert_close(avg_pool2d(view, 3, 2, 1), F.avg_pool2d(view, 3, 2, 1))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", [CASES[i] for i in (1, 2, 5, 7)], ids=str)
def test_derivatives(case, memory_format):
    x = normal((2, 3, 6, 7), torch.float64, memory_format).requires_grad_()
    f = lambda x: avg_pool2d(x, *case)  # noqa: E731
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, x, check_fwd_over_rev=True)
    y = x.detach().clone().requires_grad_()
    (a,), (b,) = (torch.autograd.grad(g(z).sin().sum(), z) for g, z in ((f, x), (lambda y: F.avg_pool2d(y, *case), y)))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TYPES)
def test_mean_of_equal_numbers_is_this_number(dtype, memory_format):
    for k in (3, 5, 6, 7, 13, (7, 11)):
        x = torch.ones(1, 20, 15, 16, dtype=dtype).contiguous(memory_format=memory_format)
        assert (avg_pool2d(x, k, 1) == 1).all()
        assert (avg_pool2d(x, k, 2, 1, count_include_pad=False) == 1).all()


def test_gradient_of_a_window_that_only_ceil_mode_fits():
    a, b = (torch.ones(1, 1, 3, 3, requires_grad=True) for _ in "ab")
    for pool, x in ((avg_pool2d, a), (F.avg_pool2d, b)):
        pool(x, 4, 2, ceil_mode=True).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(a.grad, torch.full_like(a, 1 / 9))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradients_of_long_windows_and_strides(memory_format):
    """In time and memory that grow with the map and the kernel, not with their product or the stride."""
    most = 2**31 - 1
    for shape, arguments in (
        ((1, 1, 1, 32768), ((1, 32768),)),
        ((1, 2, 1, 4000), ((1, 2001), (1, 999), (0, 500))),
        ((1, 2, 9, 8), (3, most, 1)),
        ((1, 2, 9, 8), (2, (most, 1))),
        ((1, 2, 9, 8), (2, (1, most))),
    ):
        a, b = (normal(shape, torch.float64, memory_format).requires_grad_() for _ in "ab")
        for pool, x in ((avg_pool2d, a), (F.avg_pool2d, b)):
            pool(x, *arguments).square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format):
    x = normal((2, 3, 7, 8), torch.float64, memory_format).requires_grad_()
    w = [3, 2, 2, 1, 1, 0]
    opcheck(torch.ops.fastcv.avg_pool2d, (x, *w, True, False, 0))
    grad = torch.randn_like(avg_pool2d(x, (3, 2), (2, 1), (1, 0), True)).detach().requires_grad_()
    opcheck(torch.ops.fastcv.avg_pool2d_backward, (grad, 7, 8, *w, True, 3))


def test_compile_and_vmap():
    x = normal((2, 3, 9, 8))
    f = lambda x: avg_pool2d(x, 3, 2, 1)  # noqa: E731
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))
    stacked = torch.stack([x, x + 1])
    assert torch.equal(torch.func.vmap(f)(stacked), torch.stack([f(s) for s in stacked]))


def test_errors():
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(TypeError, match=r"input.*int64"):
        avg_pool2d(x.long(), 2)
    with pytest.raises(ValueError, match=r"padding.*half"):
        avg_pool2d(x, 3, padding=2)
    with pytest.raises(ValueError, match="divisor_override"):
        avg_pool2d(x, 2, divisor_override=0)
    with pytest.raises(ValueError, match="input"):
        avg_pool2d(x, 9)
    with pytest.raises(RuntimeError, match="grad: expected 4"):
        torch.ops.fastcv.avg_pool2d_backward(x, 8, 8, 2, 2, 2, 2, 0, 0, True, 0)
    with pytest.raises(RuntimeError, match="grad: expected 0 or, with ceil_mode, 1 windows, got 8"):
        torch.ops.fastcv.avg_pool2d_backward(x, 3, 3, 4, 4, 2, 2, 0, 0, True, 0)


def test_layer_has_torchs_arguments():
    layer = fastcv.nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)
    x = normal((1, 2, 9, 9))
    torch.testing.assert_close(layer(x), torch.nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)(x))
