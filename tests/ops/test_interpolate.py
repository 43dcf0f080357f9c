"""interpolate: by hand, against torch and the reference, derivatives, machinery, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import fastcv
from fastcv import reference

FORMATS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 21, 6, 4), (1, 2, 1, 40), (2, 17, 9, 1), (1, 3, 20, 33)]
OPTIONS = [  # of torch
    dict(scale_factor=2, mode="nearest"),
    dict(scale_factor=2, mode="bilinear"),
    dict(scale_factor=(1.7, 3.3), mode="nearest"),
    dict(scale_factor=(3.3, 1.7), mode="bilinear"),
    dict(size=(13, 47), mode="nearest"),
    dict(size=(13, 47), mode="bilinear"),
    dict(size=(13, 47), mode="bilinear", align_corners=True),
    dict(size=(4, 3), mode="bilinear"),
    dict(size=(4, 3), mode="nearest"),
    dict(size=1, mode="bilinear", align_corners=True),
    dict(size=(20, 7), mode="bilinear"),
]


def features(shape=(2, 3, 3, 4), dtype=torch.float64, memory_format=torch.contiguous_format, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=memory_format)


def test_by_hand():
    """Nearest and "bed of nails" as in lectures on upsampling; bilinear with both corner conventions."""
    x = torch.tensor([[1.0, 2], [3, 4]])[None, None]
    assert fastcv.ops.interpolate(x, scale_factor=2)[0, 0].tolist() == [[1, 1, 2, 2]] * 2 + [[3, 3, 4, 4]] * 2
    nails = fastcv.ops.interpolate(x, scale_factor=2, mode="bed_of_nails")[0, 0]
    assert nails.tolist() == [[1, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]]
    line = torch.tensor([0.0, 4.0]).reshape(1, 1, 1, 2)
    assert fastcv.ops.interpolate(line, (1, 4), mode="bilinear").flatten().tolist() == [0, 1, 3, 4]
    aligned = fastcv.ops.interpolate(line, (1, 5), mode="bilinear", align_corners=True)
    assert aligned.flatten().tolist() == [0, 1, 2, 3, 4]


def test_gradient_by_hand():
    """Each input collects what its outputs got: the transposed examples."""
    grad = torch.arange(16.0).reshape(1, 1, 4, 4)
    for mode, expected in (("nearest", [[10, 18], [42, 50]]), ("bed_of_nails", [[0, 2], [8, 10]])):
        x = torch.zeros(1, 1, 2, 2, requires_grad=True)
        fastcv.ops.interpolate(x, 4, mode=mode).backward(grad)
        assert x.grad[0, 0].tolist() == expected


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_like_torch(dtype, memory_format, options):
    # Coordinates of up to 40 are rounded: the weights have an error of some 40 units in the last place of 1.
    tolerance = torch.finfo(dtype).eps * (4 if dtype.itemsize == 2 else 64)
    for shape in SHAPES:
        x = features(shape, dtype, memory_format).requires_grad_()
        y = x.detach().clone().requires_grad_()
        out, expected = fastcv.ops.interpolate(x, **options), F.interpolate(y, **options)
        assert out.dtype == dtype and out.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        grad = features(out.shape, dtype, seed=1)
        oracle = y.detach().double().requires_grad_()
        F.interpolate(oracle, **options).backward(grad.double())
        out.backward(grad)
        assert x.grad.is_contiguous(memory_format=memory_format)
        scale = max(1.0, oracle.grad.abs().max().item())
        torch.testing.assert_close(x.grad.double(), oracle.grad, rtol=0, atol=max(tolerance, 8e-6) * scale)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bed_of_nails"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype, memory_format, mode):
    for shape in SHAPES:
        x = features(shape, dtype, memory_format)
        for size in ([2 * shape[2], 3 * shape[3]], [shape[2], 5 * shape[3]]):
            out = torch.ops.fastcv.interpolate(x, size, 0.0, 0.0, mode, False)
            expected = reference.interpolate.interpolate(x, size, 0.0, 0.0, mode, False)
            torch.testing.assert_close(out, expected)
            grad = features(out.shape, dtype, memory_format, 1)
            rest = (list(shape[2:]), 0.0, 0.0, mode, False)
            gradient = torch.ops.fastcv.interpolate_backward(grad, *rest)
            expected = reference.interpolate.interpolate_backward(grad, *rest)
            torch.testing.assert_close(gradient, expected, atol=torch.finfo(dtype).eps * 16, rtol=1e-5)
            assert gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("mode", ("nearest", "bilinear", "bed_of_nails"))
@pytest.mark.parametrize(
    "shape, size, memory_format, dtype",
    [
        ((1, 4, 500, 512), (1000, 1024), FORMATS[0], torch.float32),  # rows of whole lines
        ((1, 5, 400, 401), (800, 802), FORMATS[0], torch.float32),  # rows that begin anywhere
        ((1, 2, 300, 901), (1200, 2703), FORMATS[0], torch.bfloat16),
        ((1, 3, 250, 256), (750, 1024), FORMATS[0], torch.float64),
        ((1, 32, 160, 170), (320, 340), FORMATS[1], torch.float32),  # pixels of whole lines
        ((1, 21, 200, 100), (400, 400), FORMATS[1], torch.float32),  # pixels that begin anywhere
        ((1, 21, 300, 150), (600, 600), FORMATS[1], torch.float16),
    ],
)
def test_large_outputs(shape, size, memory_format, dtype, mode):
    """Those that are written past the caches."""
    x = features(shape, dtype, memory_format)
    assert shape[0] * shape[1] * size[0] * size[1] * x.element_size() >= 12 * 2**20
    actual = fastcv.ops.interpolate(x, size, mode=mode)
    assert actual.is_contiguous(memory_format=memory_format)
    if mode == "bed_of_nails":
        rows, columns = (o // i for o, i in zip(size, shape[2:], strict=True))
        assert torch.equal(actual[:, :, ::rows, ::columns], x)
        assert actual.count_nonzero() == x.count_nonzero()
    elif mode == "nearest":
        assert torch.equal(actual, F.interpolate(x, size, mode=mode))
    else:
        tolerance = {torch.float32: 2e-6, torch.float64: 1e-13}.get(dtype, torch.finfo(dtype).eps)  # of coordinates
        expected = F.interpolate(x.float() if x.element_size() == 2 else x, size, mode=mode)
        torch.testing.assert_close(actual, expected.to(dtype), rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("scale", [1, 2, 3, 1.5])
@pytest.mark.parametrize("width", [16, 33, 48, 101])
def test_gradient_of_wide_rows(width, scale, mode):
    """Vectors of inputs whose outputs lie alike, and those at the ends, which do not."""
    x = features((1, 2, 5, width), torch.float32).requires_grad_()
    expected = x.detach().clone().requires_grad_()
    output = fastcv.ops.interpolate(x, scale_factor=scale, mode=mode)
    grad = features(output.shape, torch.float32, seed=1)
    output.backward(grad)
    F.interpolate(expected, scale_factor=scale, mode=mode).backward(grad)
    torch.testing.assert_close(x.grad, expected.grad, rtol=1e-5, atol=1e-5)  # coordinates are float32's in both


def test_special_values():
    """A NaN reaches those outputs that see it; rows and columns that are not resampled stay apart."""
    x = torch.ones(1, 1, 4, 4)
    x[0, 0, 1, 1], x[0, 0, 2, 3] = float("nan"), float("inf")
    for options in (dict(size=8), dict(size=8, mode="bilinear"), dict(size=(4, 8))):
        torch.testing.assert_close(
            fastcv.ops.interpolate(x, **options), F.interpolate(x, **options), equal_nan=True, rtol=0, atol=1e-6
        )
    torch.testing.assert_close(fastcv.ops.interpolate(x, 4, mode="bilinear"), x, equal_nan=True, rtol=0, atol=0)
    nails = fastcv.ops.interpolate(x, 8, mode="bed_of_nails")
    assert nails.isnan().sum() == 1 and nails.isinf().sum() == 1


def test_empty():
    for shape in ((0, 3, 2, 2), (2, 0, 3, 3)):
        x = torch.zeros(shape, requires_grad=True)
        out = fastcv.ops.interpolate(x, 7, mode="bilinear")
        out.sum().backward()
        assert out.shape == (*shape[:2], 7, 7) and x.grad.shape == shape


def test_strides():
    x = features((2, 20, 11, 18), torch.float32)
    for view in (x[:, ::2], x[..., ::3], x[:, :, 2:9, 1:5], x.transpose(2, 3), x[:1].expand(3, 20, 11, 18)):
        for mode in ("nearest", "bilinear", "bed_of_nails"):
            y = view.clone().requires_grad_()
            out = fastcv.ops.interpolate(view, scale_factor=2, mode=mode)
            assert torch.equal(out, fastcv.ops.interpolate(view.contiguous(), scale_factor=2, mode=mode))
            fastcv.ops.interpolate(y, scale_factor=2, mode=mode).sum().backward()  # an expanded gradient
            assert y.grad.sum().item() == pytest.approx(out.numel() if mode != "bed_of_nails" else view.numel())


def test_same_for_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        for memory_format in FORMATS:
            x = features((1, 30, 60, 61), torch.float32, memory_format).requires_grad_()
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                out = fastcv.ops.interpolate(x, (133, 144), mode="bilinear")
                results.append((out, *torch.autograd.grad((out**2).sum(), x)))
            assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bed_of_nails"])
def test_derivatives(mode):
    for memory_format in FORMATS:
        x = features((1, 2, 2, 3), memory_format=memory_format).requires_grad_()

        def f(x):
            return fastcv.ops.interpolate(x, (4, 6), mode=mode) ** 2

        assert torch.autograd.gradcheck(f, x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, x)
    operator = torch.ops.fastcv.interpolate_backward
    grad = features((1, 2, 4, 6), seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: operator(g, [2, 3], 0.0, 0.0, mode, False), grad, check_forward_ad=True)


def test_opcheck():
    for memory_format in FORMATS:
        x = features(memory_format=memory_format).requires_grad_()
        opcheck(torch.ops.fastcv.interpolate, (x, [5, 7], 1.7, 1.9, "bilinear", False))
        opcheck(torch.ops.fastcv.interpolate_backward, (x, [2, 5], 0.0, 0.0, "nearest", False))


def test_compile_vmap():
    def f(x):
        return fastcv.ops.interpolate(x, scale_factor=(1.5, 2), mode="bilinear")

    x = features().requires_grad_()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), f(x))
    assert torch.equal(*(torch.autograd.grad((g(x) ** 2).sum(), x)[0] for g in (compiled, f)))
    dynamic = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(dynamic(x), f(x))
    stacked = torch.stack([x, x + 1])
    assert torch.equal(torch.func.vmap(f)(stacked), torch.stack([f(s) for s in stacked]))


def test_errors():
    x = torch.zeros(2, 3, 4, 5)
    f = fastcv.ops.interpolate
    for bad, error, match in (
        (lambda: f(x[0], 2), ValueError, "input: expected shape"),
        (lambda: f(x.int(), 2), TypeError, "input"),
        (lambda: f(x[:, :, :0], 2), ValueError, "input: expected at least one pixel"),
        (lambda: f(x, 2, mode="bicubic"), ValueError, 'mode: expected "nearest", "bilinear" or "bed_of_nails"'),
        (lambda: f(x, 2, align_corners=True), ValueError, 'align_corners: expected None for mode "nearest"'),
        (lambda: f(x), ValueError, "size, scale_factor: expected one"),
        (lambda: f(x, 2, 2), ValueError, "size, scale_factor: expected one"),
        (lambda: f(x, 0), ValueError, "size"),
        (lambda: f(x, scale_factor=-1), ValueError, "scale_factor: expected a positive number"),
        (lambda: f(x, scale_factor=0.1), ValueError, "scale_factor: expected an output of at least one pixel"),
        (lambda: f(x, (8, 9), mode="bed_of_nails"), ValueError, "size: expected a multiple of 4 x 5"),
        (
            lambda: torch.ops.fastcv.interpolate(x, [8, 9], 0.0, 0.0, "bed_of_nails", False),
            RuntimeError,
            "output_size: expected multiples",
        ),
    ):
        with pytest.raises(error, match=match):
            bad()
