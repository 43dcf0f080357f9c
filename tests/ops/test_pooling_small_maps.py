"""Small maps, which go to torch's kernels: which ones, and that they get what the kernels here give."""

import pytest
import torch

from fastcv.ops import _pooling, adaptive_avg_pool2d, adaptive_max_pool2d, avg_pool2d, max_pool2d

CALLS = {
    "max": lambda x: max_pool2d(x, 2),
    "max, overlapping": lambda x: max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "max, indices": lambda x: max_pool2d(x, (3, 2), (1, 2), (1, 0), return_indices=True),
    "avg": lambda x: avg_pool2d(x, 2),
    "avg, options": lambda x: avg_pool2d(x, 3, 2, 1, True, False),
    "adaptive avg": lambda x: adaptive_avg_pool2d(x, 3),
    "adaptive max": lambda x: adaptive_max_pool2d(x, 3, return_indices=True),
}


def small(memory_format=torch.contiguous_format, dtype=torch.float32):
    x = torch.randn(2, 5, 9, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0, 0, 0], x[0, 0, 1, 1], x[1] = float("nan"), float("nan"), x[1].round()  # equal maxima too
    return x.contiguous(memory_format=memory_format)


def flat(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CALLS)
def test_is_what_the_kernels_give(monkeypatch, name, memory_format):
    call, results = CALLS[name], []
    for most in (_pooling._MOST_BELOW, 0):
        monkeypatch.setattr(_pooling, "_MOST_BELOW", most)
        x = small(memory_format).requires_grad_()
        result = flat(call(x))
        assert ("Derivative" in result[0].grad_fn.name()) == (most == 0)
        (gradient,) = torch.autograd.grad(result[0], x, result[0].detach().nan_to_num())
        results.append((*result, gradient))
        assert all(t.is_contiguous(memory_format=memory_format) for t in result)
    for given, expected in zip(*results, strict=True):
        torch.testing.assert_close(given, expected, equal_nan=True)


def test_which_maps():
    x = small()
    assert _pooling.torch_is_faster("max", x, 2)
    assert not _pooling.torch_is_faster("max", x, 2, dilation=2)
    assert not _pooling.torch_is_faster("max", x.bfloat16(), 2)
    assert not _pooling.torch_is_faster("max", x[0], 2)
    assert not _pooling.torch_is_faster("max", torch.nn.Parameter(x), 2)
    assert not _pooling.torch_is_faster("max", x, [2, 2])
    assert not _pooling.torch_is_faster("max", x, 10)
    assert not _pooling.torch_is_faster("max", x, 2, padding=5)
    assert not _pooling.torch_is_faster("max", torch.zeros(1, 16, 64, 64), 2)
    assert _pooling.torch_is_faster("max", torch.zeros(1, 16, 64, 32).to(memory_format=torch.channels_last), 2)
    assert _pooling.torch_is_faster("max", torch.zeros(1, 16, 32, 32).requires_grad_(), 2)
    assert not _pooling.torch_is_faster("max", torch.zeros(1, 16, 32, 32), 2)
    torch.func.vmap(lambda t: (_pooling.torch_is_faster("max", t, 2) and pytest.fail("in a transform"), t)[1])(x[None])


def test_in_the_place_of_torchs(monkeypatch):
    """No call goes round in a circle where a program re-points torch's names."""
    expected = [flat(call(small())) for call in CALLS.values()]
    for name, ours in (("max_pool2d", max_pool2d), ("adaptive_avg_pool2d", adaptive_avg_pool2d)):
        for module in (torch, torch.nn.functional, torch._C._nn):
            monkeypatch.setattr(module, name, ours, raising=False)
    monkeypatch.setattr(torch._C._nn, "avg_pool2d", avg_pool2d)
    for call, results in zip(CALLS.values(), expected, strict=True):
        torch.testing.assert_close(flat(call(small())), results, equal_nan=True)


def test_errors_are_the_same():
    with pytest.raises(ValueError, match="input: expected at least 10 x 10 pixels"):
        max_pool2d(small(), 10)
    with pytest.raises(ValueError, match="padding: expected at most half"):
        avg_pool2d(small(), 2, padding=2)
    with pytest.raises((TypeError, ValueError), match="kernel_size"):
        max_pool2d(small(), 2.0)
