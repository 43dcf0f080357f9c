"""What the pooling operators take as sizes: what torch takes, whatever was called before."""

import pytest
import torch
import torch.nn.functional as F

from fastcv import ops
from fastcv.ops import _pooling


class Two:
    """An integer of another library, as numpy's."""

    def __index__(self):
        return 2


NUMPY = pytest.importorskip("numpy").int64(2)


@pytest.fixture(autouse=True, params=["own kernels", "torch's for small maps"])
def kernels(request, monkeypatch):
    if request.param == "own kernels":
        monkeypatch.setattr(_pooling, "_MOST_BELOW", 0)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
@pytest.mark.parametrize("size", [[2], (2,), [2, 2], NUMPY, (NUMPY, 2), [NUMPY]], ids=repr)
def test_sizes(name, size):
    x = normal(1, 2, 6, 6)
    pool, theirs = getattr(ops, name), getattr(F, name)
    assert torch.equal(pool(x, size), theirs(x, size))
    assert torch.equal(pool(x, 4, size, size), theirs(x, 4, size, size))
    assert torch.equal(pool(x, Two()), theirs(x, 2))


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
@pytest.mark.parametrize("stride", [None, (), []])
def test_no_stride_is_the_kernel(name, stride):
    x = normal(1, 2, 6, 6)
    assert torch.equal(getattr(ops, name)(x, (3, 2), stride), getattr(F, name)(x, (3, 2)))


@pytest.mark.parametrize("pool", [ops.max_pool2d, ops.avg_pool2d])
def test_other_numbers_are_refused_after_the_ints_they_equal(pool):
    x = normal(1, 2, 6, 6)
    for good, bad in ((2, 2.0), (1, True), ((2, 2), (2.0, 2)), ((1, 1), (1, True)), (2, "2"), (2, [2, 2, 2]), (2, [])):
        pool(x, good, good)
        for arguments in ((bad,), (good, bad or 0)):
            with pytest.raises(ValueError, match=r"kernel_size|stride"):
                pool(x, *arguments)
    pool(x, 2, 2, 0)
    with pytest.raises(ValueError, match="padding"):
        pool(x, 2, 2, False)


def test_numbers_of_bins_and_divisors():
    x = normal(1, 2, 6, 6)
    for size, expected in ((NUMPY, 2), ((NUMPY, None), (2, 6)), ([3, Two()], (3, 2))):
        torch.testing.assert_close(ops.adaptive_avg_pool2d(x, size), F.adaptive_avg_pool2d(x, expected))
    for bad in (True, (True, 2), (2,), 2.0):
        with pytest.raises(ValueError, match="output_size"):
            ops.adaptive_max_pool2d(x, bad)
    assert torch.equal(ops.avg_pool2d(x, 2, divisor_override=NUMPY), F.avg_pool2d(x, 2, divisor_override=2))
    with pytest.raises(ValueError, match="divisor_override"):
        ops.avg_pool2d(x, 2, divisor_override=True)


@pytest.mark.parametrize("samples", [0, 2])
def test_vmap_over_any_number_of_samples(samples):
    x = normal(samples, 1, 2, 4, 4)
    for pool, theirs in (
        (lambda x: ops.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 2)),
        (lambda x: ops.avg_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2)),
        (lambda x: ops.adaptive_avg_pool2d(x, 3), lambda x: F.adaptive_avg_pool2d(x, 3)),
    ):
        expected = theirs(x.flatten(0, 1)).unflatten(0, (samples, 1))
        torch.testing.assert_close(torch.func.vmap(pool)(x), expected)
    values, indices = torch.func.vmap(lambda x: ops.max_pool2d(x, 2, return_indices=True))(x)
    assert values.shape == indices.shape == (samples, 1, 2, 2, 2)
