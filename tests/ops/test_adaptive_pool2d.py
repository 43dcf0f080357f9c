"""Adaptive and spatial pyramid pooling: by hand, against torch and the reference, derivatives, machinery, errors."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import run_python
from torch.library import opcheck

from fastcv import reference
from fastcv.ops import _pooling, adaptive_avg_pool2d, adaptive_max_pool2d, spatial_pyramid_pool

FORMATS = (torch.contiguous_format, torch.channels_last)
TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = [1, 2, (3, 5), 7, (None, 3), (10, 1)]
SHAPES = [(2, 3, 9, 8), (1, 37, 7, 7), (1, 300, 5, 6), (0, 3, 4, 4), (2, 0, 4, 4)]
NAN = float("nan")


@pytest.fixture(autouse=True)
def own_kernels(monkeypatch):
    """Small maps would go to torch's (tests/ops/test_pooling_small_maps.py)."""
    monkeypatch.setattr(_pooling, "_MOST_BELOW", 0)


def normal(shape, dtype=torch.float32, memory_format=torch.contiguous_format, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=memory_format)


def test_by_hand():
    """Bins of 3 pixels in 2 share the middle one."""
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])[None, None]
    assert adaptive_avg_pool2d(x, 2).flatten().tolist() == [3, 4, 6, 7]
    values, indices = adaptive_max_pool2d(x, 2, return_indices=True)
    assert values.flatten().tolist() == [5, 6, 8, 9] and indices.flatten().tolist() == [4, 5, 7, 8]
    assert spatial_pyramid_pool(x, (2, 1)).tolist() == [[5, 6, 8, 9, 9]]
    assert spatial_pyramid_pool(x, (1, 2), "avg").tolist() == [[5, 3, 4, 6, 7]]


def test_nan_and_ties():
    x = torch.tensor([[NAN, 1, 2, 2], [5, NAN, 2, 2]])[None, None]
    for memory_format in FORMATS:
        values, indices = adaptive_max_pool2d(x.contiguous(memory_format=memory_format), (1, 2), return_indices=True)
        assert values[0, 0, 0, 0].isnan() and values[0, 0, 0, 1] == 2
        assert indices.flatten().tolist() == [5, 2]
    assert adaptive_avg_pool2d(x, (1, 2)).isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference(size, dtype, memory_format):
    tolerance = 16 * torch.finfo(dtype).eps
    for shape in SHAPES:
        x = normal(shape, dtype, memory_format)
        x = x.mul(2).round()
        out = adaptive_avg_pool2d(x, size)
        oracle = reference.adaptive_pool2d.adaptive_avg_pool2d(x.double(), *out.shape[2:])
        torch.testing.assert_close(out.double(), oracle, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(oracle, F.adaptive_avg_pool2d(x.double(), size))
        grad = normal(out.shape, dtype, memory_format, seed=1)
        gradient = torch.ops.fastcv.adaptive_avg_pool2d_backward(grad, *shape[2:])
        oracle = reference.adaptive_pool2d.adaptive_avg_pool2d_backward(grad.double(), *shape[2:])
        torch.testing.assert_close(gradient.double(), oracle, rtol=tolerance, atol=tolerance)
        values, indices = adaptive_max_pool2d(x, size, return_indices=True)
        expected = reference.adaptive_pool2d.adaptive_max_pool2d(x, *out.shape[2:])
        assert torch.equal(values, expected[0]) and torch.equal(indices, expected[1])
        if not x.numel():  # no memory format, and torch takes no maps without channels
            continue
        for theirs, ours in zip(F.adaptive_max_pool2d(x, size, True), expected, strict=True):
            assert torch.equal(theirs, ours)
        assert all(result.is_contiguous(memory_format=memory_format) for result in (out, values, indices))
        for pool in (adaptive_avg_pool2d, adaptive_max_pool2d):
            y = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(pool(y, size), y, grad)
            assert gradient.is_contiguous(memory_format=memory_format)


def test_no_bins():
    x = normal((2, 3, 4, 4)).requires_grad_()
    for pool in (adaptive_avg_pool2d, adaptive_max_pool2d):
        out = pool(x, (0, 2))
        assert out.shape == (2, 3, 0, 2)
        assert torch.autograd.grad(out.sum(), x)[0].count_nonzero() == 0


def test_strided_and_unbatched():
    x = normal((2, 6, 20, 22))
    for view in (x[:, ::2], x[:, :, ::2], x[..., 1::2], x.transpose(2, 3), x[:1].expand(3, -1, -1, -1), x[0]):
        for size in (1, (3, 4)):
            torch.testing.assert_close(adaptive_avg_pool2d(view, size), F.adaptive_avg_pool2d(view, size))
            assert torch.equal(adaptive_max_pool2d(view, size), F.adaptive_max_pool2d(view, size))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("size", [1, (2, 3), (4, 5)], ids=str)
def test_derivatives(size, memory_format):
    x = normal((2, 3, 4, 5), torch.float64, memory_format).requires_grad_()
    for f in (
        lambda x: adaptive_avg_pool2d(x, size),
        lambda x: adaptive_max_pool2d(x, size),
        lambda x: spatial_pyramid_pool(x, (2, 1)),
    ):
        assert torch.autograd.gradcheck(f, x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, x, check_fwd_over_rev=True)
    y = x.detach().clone().requires_grad_()
    adaptive_max_pool2d(x, size).sin().sum().backward()
    F.adaptive_max_pool2d(y, size).sin().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format):
    x = normal((2, 3, 7, 8), torch.float64, memory_format).requires_grad_()
    opcheck(torch.ops.fastcv.adaptive_avg_pool2d, (x, 3, 2))
    opcheck(torch.ops.fastcv.adaptive_max_pool2d, (x, 3, 2))
    opcheck(torch.ops.fastcv.adaptive_avg_pool2d_backward, (x, 9, 11))


def test_compile_and_vmap():
    x = normal((2, 3, 9, 8))
    f = spatial_pyramid_pool
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))
    stacked = torch.stack([x, x + 1])
    assert torch.equal(torch.func.vmap(f)(stacked), torch.stack([f(s) for s in stacked]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_maps_of_more_rows_than_scratch_holds(dtype):
    """Bins higher than what is held at once, fewer, as many and more bins than rows, and rows that lie apart."""
    for shape in ((1, 19, 40, 20), (2, 3, 37, 301), (1, 2, 21, 1100), (1, 33, 17, 13)):
        x = normal(shape, dtype)
        for view in (x, x[..., 1::2], x[:, :, ::2]):
            for size in ((1, 2), (2, 3), (7, 70), 36, (45, 5)):
                values, indices = adaptive_max_pool2d(view, size, return_indices=True)
                expected, positions = F.adaptive_max_pool2d(view, size, return_indices=True)
                assert torch.equal(values, expected) and torch.equal(indices, positions)
                oracle = F.adaptive_avg_pool2d(view.double(), size)
                tolerance = 16 * torch.finfo(dtype).eps
                torch.testing.assert_close(
                    adaptive_avg_pool2d(view, size).double(), oracle, rtol=tolerance, atol=tolerance
                )


def test_same_for_any_number_of_threads():
    x, threads, results = normal((1, 20, 90, 200)), torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append((adaptive_avg_pool2d(x, 7), *adaptive_max_pool2d(x, (31, 5), return_indices=True)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_mean_of_equal_numbers_is_this_number(memory_format):
    for size in (3, 5, 6, 7, 11, 13, 49):
        x = torch.ones(1, 20, size, size).contiguous(memory_format=memory_format)
        assert (adaptive_avg_pool2d(x, 1) == 1).all() and (adaptive_avg_pool2d(x, 2) == 1).all()


def test_scratch_is_a_few_rows():
    """Not a copy of the map with a vector of channels for the one it has."""
    script = """
import re, torch, fastcv
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
x = torch.randn(1, 1, 3000, 3000)
fastcv.ops.adaptive_avg_pool2d(x[..., :50, :50], 7)
before = peak()
fastcv.ops.adaptive_avg_pool2d(x, 7)
fastcv.ops.adaptive_max_pool2d(x, 7)
print(peak() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    assert int(run_python(["-c", script]).stdout) < 40_000


def test_pyramid_of_any_size_has_one_length():
    for height, width in ((13, 13), (10, 17), (4, 4)):
        x = normal((2, 8, height, width))
        for mode, theirs in (("max", F.adaptive_max_pool2d), ("avg", F.adaptive_avg_pool2d)):
            expected = torch.cat([theirs(x, level).flatten(1) for level in (4, 2, 1)], 1)
            torch.testing.assert_close(spatial_pyramid_pool(x, mode=mode), expected)
            assert expected.shape == (2, 8 * 21)
    assert torch.equal(spatial_pyramid_pool(x[0]), spatial_pyramid_pool(x)[0])


def test_errors():
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(TypeError, match=r"input.*int64"):
        adaptive_avg_pool2d(x.long(), 2)
    for size in (-1, (1, 2, 3), "2", (1.5, 2)):
        with pytest.raises(ValueError, match="output_size"):
            adaptive_max_pool2d(x, size)
    with pytest.raises(ValueError, match=r"input.*0 x 8"):
        adaptive_avg_pool2d(x[:, :, :0], 2)
    with pytest.raises(ValueError, match=r"mode.*'mean'"):
        spatial_pyramid_pool(x, mode="mean")
    for levels in ((), (2, 0), (1.5,)):
        with pytest.raises(ValueError, match="levels"):
            spatial_pyramid_pool(x, levels)
