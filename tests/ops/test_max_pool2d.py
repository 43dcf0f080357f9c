"""max_pool2d: by hand, against torch and the reference, derivatives, machinery, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import fastcv
from fastcv import reference
from fastcv.ops import _pooling, max_pool2d

FORMATS = (torch.contiguous_format, torch.channels_last)
TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")
WINDOWS = [  # kernel, stride, padding, dilation, ceil_mode
    (2, None, 0, 1, False),
    (2, None, 0, 1, True),
    (3, 2, 1, 1, False),
    (3, 2, 1, 1, True),
    (3, 1, 1, 1, False),
    ((3, 2), (1, 3), (1, 0), 1, False),
    (2, 1, 0, 2, False),
    (4, 3, 2, 1, True),
    ((2, 3), 2, (1, 1), (2, 1), False),
]
SHAPES = [(2, 3, 9, 8), (1, 16, 7, 7), (2, 70, 5, 33), (3, 5, 6, 64), (0, 3, 8, 8), (2, 0, 8, 8)]


@pytest.fixture(autouse=True)
def own_kernels(monkeypatch):
    """Small maps would go to torch's (tests/ops/test_pooling_small_maps.py)."""
    monkeypatch.setattr(_pooling, "_MOST_BELOW", 0)


def sample(shape, dtype=torch.float32, memory_format=torch.contiguous_format, seed=0):
    """Few distinct values, so that many are equal."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(3).round().to(dtype)
    return x.contiguous(memory_format=memory_format)


def test_by_hand():
    x = torch.tensor([[1.0, 2, 6, 3], [3, 5, 2, 1], [1, 2, 2, 1], [7, 3, 4, 8]])[None, None]
    values, indices = max_pool2d(x, 2, return_indices=True)
    assert values.tolist() == [[[[5, 6], [7, 8]]]]
    assert indices.tolist() == [[[[5, 2], [12, 15]]]]
    _, compact = max_pool2d(x, 2, return_indices=True, indices="compact")
    assert compact.positions.tolist() == [[[[3, 0], [2, 3]]]] and compact.positions.dtype == torch.uint8
    assert compact.input_size == (4, 4) and torch.equal(compact.flat(), indices)


def test_nan_infinity_and_ties():
    x = torch.tensor([[NAN, 1, 2, 2], [5, NAN, 2, 2], [-INF, -INF, 0, -0.0], [-INF, -INF, -0.0, 0]])[None, None]
    for index, expected in (("int64", [5, 2, 8, 10]), ("compact", [3, 0, 0, 0])):
        values, indices = max_pool2d(x, 2, return_indices=True, indices=index)
        indices = indices if index == "int64" else indices.positions
        assert values[0, 0, 0, 0].isnan() and values.flatten()[1:].tolist() == [2, -INF, 0]
        assert indices.flatten().tolist() == expected  # the last NaN, the first of equals


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_like_torch(window, dtype, memory_format):
    for shape in SHAPES[:4]:
        x = sample(shape, dtype, memory_format)
        x[0, 0, 2, 3] = x[0, 0, 3, 3] = NAN
        x[0, -1] = -INF
        expected, positions = F.max_pool2d(x, *window, return_indices=True)
        values, indices = max_pool2d(x, *window, return_indices=True)
        _, compact = max_pool2d(x, *window, return_indices=True, indices="compact")
        torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(max_pool2d(x, *window), expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(indices, positions) and torch.equal(compact.flat(), positions)
        for result in (values, indices, compact.positions):
            assert result.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("index_bytes", [0, 1, 8])
def test_reference(shape, index_bytes):
    x = sample(shape, torch.float64)
    for kernel, stride, padding, dilation, ceil_mode in WINDOWS:
        w = fastcv.ops._pooling.window(kernel, stride, padding, dilation)
        expected = reference.max_pool2d.max_pool2d(x, *w, ceil_mode, index_bytes)
        for value, oracle in zip(torch.ops.fastcv.max_pool2d(x, *w, ceil_mode, index_bytes), expected, strict=True):
            assert torch.equal(value, oracle) and value.dtype == oracle.dtype


def test_wide_windows_and_strides():
    x = sample((1, 2, 90, 70))
    for window in ((17, 1, 8), (65, 3, 20), ((1, 41), (2, 37), 0), (3, 9, 1), (2, 2, 1), (70, 70, 0)):
        values, indices = max_pool2d(x, *window, return_indices=True)
        expected, positions = F.max_pool2d(x, *window, return_indices=True)
        assert torch.equal(values, expected) and torch.equal(indices, positions)
        grad = sample(values.shape, seed=1)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        max_pool2d(a, *window).backward(grad)
        F.max_pool2d(b, *window).backward(grad)
        assert torch.equal(a.grad, b.grad)


def test_gradients_of_long_windows_and_strides():
    """In time and memory that grow with the map and the kernel, not with their product or the stride."""
    most = 2**31 - 1
    for shape, arguments in (
        ((1, 1, 1, 32768), ((1, 32768),)),
        ((1, 2, 1, 4000), ((1, 401), (1, 999), (0, 200), (1, 3))),
        ((1, 2, 9, 8), (3, most, 1)),
        ((1, 2, 9, 8), (2, (1, most))),
    ):
        a, b = (sample(shape).requires_grad_() for _ in "ab")
        for pool, x in ((max_pool2d, a), (F.max_pool2d, b)):
            pool(x, *arguments).square().sum().backward()
        assert torch.equal(a.grad, b.grad)


def test_strided_and_unbatched():
    x = sample((2, 6, 20, 22))
    for view in (x[:, ::2], x[:, :, ::2], x[..., 1::2], x.transpose(2, 3), x[:1].expand(3, -1, -1, -1), x[0]):
        assert torch.equal(max_pool2d(view, 3, 2, 1), F.max_pool2d(view, 3, 2, 1))
        _, compact = max_pool2d(view, 2, return_indices=True, indices="compact")
        assert torch.equal(compact.flat(), F.max_pool2d(view, 2, return_indices=True)[1])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("window", [WINDOWS[i] for i in (1, 3, 5, 8)], ids=str)
def test_derivatives(window, memory_format):
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    for f in (
        lambda x: max_pool2d(x, *window),
        lambda x: max_pool2d(x, *window, return_indices=True)[0],
        lambda x: max_pool2d(x, *window, return_indices=True, indices="compact")[0],
    ):
        assert torch.autograd.gradcheck(f, x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, x)
    y = x.detach().clone().requires_grad_()
    weight = torch.randn_like(F.max_pool2d(y, *window))
    (F.max_pool2d(y, *window) * weight).sum().backward()
    (max_pool2d(x, *window) * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    window_numbers = fastcv.ops._pooling.window(*window[:4])
    (without,) = torch.autograd.grad(
        (torch.ops.fastcv.max_pool2d(x, *window_numbers, window[4], 0)[0] * weight).sum(), x
    )
    assert torch.equal(without, x.grad)  # finds the positions again


def test_functional_derivatives():
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pooled = F.max_pool2d(x, 2)
    assert torch.equal(torch.func.grad(lambda x: (max_pool2d(x, 2) ** 2).sum())(x).sum(), 2 * pooled.sum())
    value, tangent = torch.func.jvp(lambda x: max_pool2d(x, 2), (x,), (x,))
    assert torch.equal(value, pooled) and torch.equal(tangent, pooled)
    stacked = torch.stack([x, x + 1], 1)
    mapped = torch.func.vmap(lambda x: max_pool2d(x, 2, return_indices=True), in_dims=1)(stacked)
    for k in (0, 1):
        assert torch.equal(mapped[k], torch.stack([F.max_pool2d(y, 2, return_indices=True)[k] for y in (x, x + 1)]))


def test_derivative_keeps_bytes_not_the_input():
    kept = []
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        max_pool2d(x, 2)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, 64)]


def test_same_for_any_number_of_threads():
    x, threads, results = sample((2, 40, 60, 60)), torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        y = x.clone().requires_grad_()
        out = max_pool2d(y, 3, 1, 1)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        results.append(y.grad)
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format):
    x = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    for index_bytes in (0, 1, 8):
        opcheck(torch.ops.fastcv.max_pool2d, (x, 3, 2, 2, 1, 1, 0, 1, 1, True, index_bytes))


def test_compile():
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def f(x):
        values, switches = max_pool2d(x, 2, return_indices=True, indices="compact")
        return max_pool2d(x, 3, 2, 1), fastcv.ops.max_unpool2d(values, switches)

    for actual, expected in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x), strict=True):
        assert torch.equal(actual, expected)
        (a,), (b,) = (torch.autograd.grad(y.square().sum(), x, retain_graph=True) for y in (actual, expected))
        assert torch.equal(a, b)


def test_large_outputs_are_written_past_the_caches():
    x = sample((1, 70, 512, 514))
    values, compact = max_pool2d(x, 2, return_indices=True, indices="compact")
    assert values.numel() * 4 >= 16 << 20
    expected, positions = F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(values, expected) and torch.equal(compact.flat(), positions)
    assert torch.equal(
        fastcv.ops.max_unpool2d(values, compact), F.max_unpool2d(expected, positions, 2, output_size=x.shape)
    )


def test_errors():
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(TypeError, match=r"input.*int64"):
        max_pool2d(x.long(), 2)
    with pytest.raises(ValueError, match=r"input.*\[8, 8\]"):
        max_pool2d(x[0, 0], 2)
    with pytest.raises(ValueError, match=r"input.*9 x 9"):
        max_pool2d(x, 9)
    with pytest.raises(ValueError, match="kernel_size"):
        max_pool2d(x, 0)
    with pytest.raises(ValueError, match="stride"):
        max_pool2d(x, 2, (1, 0))
    with pytest.raises(ValueError, match=r"padding.*half"):
        max_pool2d(x, 2, padding=2)
    with pytest.raises(ValueError, match=r"indices.*compact.*'int32'"):
        max_pool2d(x, 2, return_indices=True, indices="int32")
    with pytest.raises(ValueError, match=r"255 elements, got 16 x 16"):
        max_pool2d(torch.zeros(1, 1, 16, 16), 16, return_indices=True, indices="compact")
    with pytest.raises(RuntimeError, match="window 0 has no pixel"):
        max_pool2d(torch.zeros(1, 1, 1, 1), 2, padding=2, dilation=3)
    with pytest.raises(RuntimeError, match="index_bytes"):
        torch.ops.fastcv.max_pool2d(x, 2, 2, 2, 2, 0, 0, 1, 1, False, 4)
    with pytest.raises(RuntimeError, match="stride"):
        torch.ops.fastcv.max_pool2d(x, 2, 2, 0, 2, 0, 0, 1, 1, False, 1)
