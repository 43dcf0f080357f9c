"""The operators with kernels against torchvision's, over thousands of random cases.

Types, layouts, strides, empty inputs, negative, inverted and far away boxes. Where torchvision is
not sound (``fastcv.interop.torchvision`` lists it) it is not asked: scores are distinct and not NaN,
classes are told apart at coordinates of at least 0.
"""

import random

import pytest
import torch

import fastcv

tv = pytest.importorskip("torchvision").ops
DTYPES = (torch.float32, torch.float64)


def rng(case):
    """Of Python and torch, from the number of the case."""
    return random.Random(case), torch.Generator().manual_seed(case)


def boxes(r, g, n, low, high):
    """Mostly upright; whole numbers or not, some without area, some inverted."""
    corners = torch.rand(n, 4, generator=g, dtype=torch.float64) * (high - low) + low
    upright = torch.cat([corners.view(n, 2, 2).amin(1), corners.view(n, 2, 2).amax(1)], 1)
    chosen = torch.rand(n, 1, generator=g)
    result = torch.where(chosen < r.choice((0.0, 0.1)), corners, upright)
    result[:, 2:] = torch.where(chosen > 0.95, result[:, :2], result[:, 2:])
    return result.round() if r.random() < 0.5 else result


def strided(r, x):
    """The same values, contiguous, transposed in memory, or with gaps."""
    way = r.randrange(3)
    if way == 1:
        return x.t().contiguous().t() if x.dim() == 2 else x
    if way == 2:
        return x.repeat_interleave(2, 0)[::2]
    return x


def layout(r, x):
    choice = r.randrange(3)
    if choice == 1:
        return x.contiguous(memory_format=torch.channels_last)
    return x.transpose(2, 3).contiguous().transpose(2, 3) if choice == 2 else x


@pytest.mark.parametrize("block", range(10))
def test_nms(block):
    for case in range(block * 100, block * 100 + 100):
        r, g = rng(case)
        n, dtype = r.choice((0, 1, 2, 7, 40, 150, 700)), r.choice(DTYPES)
        b = strided(r, boxes(r, g, n, r.choice((-50, 0)), r.choice((10, 60, 400))).to(dtype))
        scores = strided(r, (torch.randperm(n, generator=g) / max(n, 1) - 0.3).to(dtype))
        threshold = r.choice((0.0, 0.25, 0.5, 0.7, 1.0, r.random()))
        expected = tv.nms(b, scores, threshold)
        assert torch.equal(fastcv.ops.nms(b, scores, threshold), expected), case


@pytest.mark.parametrize("block", range(5))
def test_batched_nms(block):
    for case in range(block * 100, block * 100 + 100):
        r, g = rng(case)
        n, dtype = r.choice((0, 1, 2, 30, 300, 1500)), r.choice(DTYPES)
        b = boxes(r, g, n, 0, r.choice((20, 100))).round().to(dtype)  # shifted without rounding
        scores = (torch.randperm(n, generator=g) / max(n, 1)).to(dtype)
        ids = torch.randint(r.choice((1, 3, 90)), (n,), generator=g)
        threshold = r.choice((0.3, 0.5, 0.75))
        expected = tv.batched_nms(b, scores, ids, threshold)
        assert torch.equal(fastcv.ops.batched_nms(b, scores, ids, threshold), expected), case


def pooling_case(name, case):
    """Input and the other arguments of one of the four RoI operators."""
    r, g = rng(case)
    ph, pw = r.choice((1, 2, 3, 7)), r.choice((1, 2, 3, 7))
    channels = r.choice((1, 3, 16, 19)) * (ph * pw if name.startswith("ps") else 1)
    size = (r.choice((1, 2)), channels, r.choice((1, 5, 14)), r.choice((1, 6, 17)))
    dtype = r.choice(DTYPES)
    x = layout(r, torch.randn(size, generator=g, dtype=dtype)).requires_grad_()
    k, scale = r.choice((0, 1, 5, 30)), r.choice((1.0, 0.5, 0.0625))
    span = 16 / scale
    b = boxes(r, g, k, -0.3 * span, r.choice((0.5, 1.0, 1.6)) * span)
    if name.endswith("align"):  # inverted regions make torchvision ask for a vector of size -1
        b = torch.cat([b.view(k, 2, 2).amin(1), b.view(k, 2, 2).amax(1)], 1)
    images = torch.randint(size[0], (k, 1), generator=g)
    rois = strided(r, torch.cat([images, b], 1).to(dtype))
    extra = []
    if name.endswith("align"):
        extra.append(r.choice((-1, 0, 1, 2, 3)))
    if name == "roi_align":
        extra.append(r.random() < 0.5)
    return x, rois, (ph, pw), scale, *extra


@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("name", ["roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"])
def test_pooling(name, block):
    for case in range(block * 100, block * 100 + 100):
        x, *rest = pooling_case(name, case)
        expected = getattr(tv, name)(x, *rest)
        actual = getattr(fastcv.ops, name)(x, *rest)
        assert actual.dtype == expected.dtype
        close = {"rtol": 1e-4, "atol": 1e-4, "msg": lambda m: f"case {case}: {m}"}  # noqa: B023
        torch.testing.assert_close(actual, expected.nan_to_num(), **close)  # NaN: 0 / 0 of a region without samples
        weight = torch.randn_like(expected)
        (gradient,) = torch.autograd.grad((actual * weight).sum(), x)
        if name == "ps_roi_pool":  # torchvision's is not that of its output: ours is, as it is linear
            torch.testing.assert_close((gradient * x).sum(), (expected * weight).sum(), **close)
            continue
        (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), x)
        torch.testing.assert_close(gradient, expected_gradient, **close)


@pytest.mark.parametrize("block", range(4))
def test_deform_conv2d(block):
    for case in range(block * 50, block * 50 + 50):
        r, g = rng(case)
        dtype = r.choice(DTYPES)

        def random_tensor(*size, g=g, dtype=dtype):
            return torch.randn(size, generator=g, dtype=dtype).requires_grad_()

        groups, offset_groups = r.choice(((1, 1), (2, 1), (1, 2), (2, 2)))
        n, c_in, c_out = r.choice((1, 2)), 2 * r.choice((1, 2, 8)), 2 * r.choice((1, 3))
        kernel = (r.choice((1, 2, 3)), r.choice((1, 3)))
        stride, pad, dilation = ((r.choice((1, 2)), r.choice((1, 2))) for _ in range(3))
        height, width = r.choice((6, 9)), r.choice((5, 11))
        out = [
            (side + 2 * p - d * (k - 1) - 1) // s + 1
            for side, p, d, k, s in zip((height, width), pad, dilation, kernel, stride, strict=True)
        ]
        taps = offset_groups * kernel[0] * kernel[1]
        x = random_tensor(n, c_in, height, width)
        offset = random_tensor(n, 2 * taps, *out)
        weight = random_tensor(c_out, c_in // groups, *kernel)
        bias = random_tensor(c_out) if r.random() < 0.5 else None
        mask = random_tensor(n, taps, *out) if r.random() < 0.5 else None
        arguments = (layout(r, x), offset, weight, bias, stride, pad, dilation, mask)
        expected = tv.deform_conv2d(*arguments)
        actual = fastcv.ops.deform_conv2d(*arguments)
        close = {"rtol": 1e-3, "atol": 1e-3, "msg": lambda m: f"case {case}: {m}"}  # noqa: B023
        torch.testing.assert_close(actual, expected, **close)
        inputs = [t for t in (x, offset, weight, bias, mask) if t is not None]
        expected_gradients = torch.autograd.grad(expected.square().mean(), inputs)
        gradients = torch.autograd.grad(actual.square().mean(), inputs)
        torch.testing.assert_close(gradients, expected_gradients, **close)
