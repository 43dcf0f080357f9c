"""ps_roi_align and ps_roi_pool: by hand, against the reference, derivatives, machinery, errors."""

import pytest
import torch
from roi_cases import FLOATS, FORMATS, random_case
from torch.library import opcheck

import fastcv
from fastcv import reference
from fastcv._library import OPERATORS

NAMES = ("ps_roi_align", "ps_roi_pool")
REGIONS = torch.tensor(
    [[0, 1.3, 2.2, 7.7, 6.1], [1, -1, -2, 4, 3.5], [1, 2, 2, 2, 2], [0, 60, 60, 70, 70]], dtype=torch.float64
)
EXTRA = {"ps_roi_align": (2,), "ps_roi_pool": ()}


def operator(name):
    return getattr(torch.ops.fastcv, name)


def pool(name, x, boxes=REGIONS, output_size=(3, 2), scale=0.9):
    return getattr(fastcv.ops, name)(x, boxes, output_size, scale, *EXTRA[name])


def features(memory_format=torch.contiguous_format, channels=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6 * channels, 9, 8, dtype=torch.float64, generator=generator)
    return x.contiguous(memory_format=memory_format).requires_grad_()


@pytest.mark.parametrize("name", NAMES)
def test_each_bin_pools_its_own_channel(name):
    """Constant channels: output channel c, bin (ph, pw) is input channel (c * 2 + ph) * 3 + pw."""
    x = torch.arange(24.0).view(1, 24, 1, 1).expand(1, 24, 9, 9)
    out = pool(name, x, torch.tensor([[0.0, 1, 1, 7, 7]]), (2, 3), 1.0)
    torch.testing.assert_close(out.flatten(), torch.arange(24.0))


def test_align_by_hand():
    """One bin of one sample, at (1.5, 2.5) - 0.5: the mean of nothing but pixel (2, 1)."""
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    region = torch.tensor([[0.0, 1, 2, 2, 3]])
    assert fastcv.ops.ps_roi_align(x, region, 1, sampling_ratio=1).item() == 9
    # No extent: no samples where sampling is adaptive, one at the point itself where it is not.
    region = torch.tensor([[0.0, 1.5, 2.5, 1.5, 2.5]])
    assert fastcv.ops.ps_roi_align(x, region, 1).item() == 0
    assert fastcv.ops.ps_roi_align(x, region, 1, sampling_ratio=1).item() == 9


def test_pool_by_hand():
    """The second corner is not included, and never the last row or column of the map."""
    x = torch.arange(16.0).reshape(1, 1, 4, 4)

    def of(*box):
        return fastcv.ops.ps_roi_pool(x, torch.tensor([[0.0, *box]]), 1).item()

    assert of(0, 0, 2, 1) == 0.5
    assert of(0, 0, 4, 4) == pytest.approx(5)  # rows and columns 0 to 2
    assert of(1.4, 1.4, 1.4, 1.4) == 5  # at least a pixel: (1, 1)
    assert of(3, 0, 4, 4) == 0
    assert of(-9, -9, -5, -5) == 0
    assert of(-0.5, 0, 1, 1) == 0  # half away from zero: from -1


@pytest.mark.parametrize("name", NAMES)
def test_non_finite_regions_give_zero(name):
    inf, nan = float("inf"), float("nan")
    for box in ([nan, 0, 2, 2], [0, 0, inf, 2], [0, -inf, 2, 2], [0, 0, 2, 3e38]):
        out = pool(name, torch.ones(1, 6, 4, 4), torch.tensor([[0.0, *box]]))
        assert not out.any()


def test_huge_regions_stay_in_bounds():
    x = torch.ones(1, 6, 5, 700)
    boxes = torch.tensor([[0.0, -9e8, -9e8, 9e8, 9e8], [0, 3e7, 3e7, 9e8, 9e8], [0, -4e7, 0, 4e7, 9]])
    for dtype in (torch.float32, torch.float64):
        out = pool("ps_roi_pool", x, boxes.to(dtype), (2, 3), 1.0)
        expected = reference.ps_roi_pool.ps_roi_pool(x, boxes.to(dtype), 1.0, 2, 3)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("channels", [1, 7, 16, 21])
@pytest.mark.parametrize("regions", [0, 2, 16])
def test_reference(name, dtype, memory_format, channels, regions):
    generator = torch.Generator().manual_seed(channels)
    x, boxes = random_case(generator, 2, channels * 6, 11, 14, regions, dtype)
    x = x.contiguous(memory_format=memory_format)
    constants = (0.7, 2, 3)
    out = operator(name)(x, boxes, *constants, *EXTRA[name])
    expected = OPERATORS[name](x.double(), boxes, *constants, *EXTRA[name])
    assert out.dtype == dtype and out.is_contiguous(memory_format=memory_format)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=2 * eps, atol=8 * min(eps, 1e-6))
    grad = torch.randn(out.shape, generator=generator).to(dtype).contiguous(memory_format=memory_format)
    shape = x.shape
    gradient = operator(f"{name}_backward")(grad, boxes, *constants, *shape, *EXTRA[name])
    oracle = OPERATORS[f"{name}_backward"](grad.double(), boxes, *constants, *shape, *EXTRA[name])
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), oracle, rtol=2 * eps, atol=16 * min(eps, 1e-6))


@pytest.mark.parametrize("name", NAMES)
def test_strides_and_expanded_gradients(name):
    x = features()
    sliced = torch.cat([x, x], 3).detach()[:, :, :, 1::2].requires_grad_()
    dense = sliced.detach().clone().requires_grad_()
    for y in (sliced, dense):
        pool(name, y).sum().backward()
    assert torch.equal(pool(name, sliced), pool(name, dense))
    torch.testing.assert_close(sliced.grad, dense.grad)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_derivatives(name, memory_format):
    x = features(memory_format, channels=1)

    def f(x):
        return pool(name, x)

    assert torch.autograd.gradcheck(f, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, x)
    tangent = torch.ones_like(x)
    assert torch.equal(torch.func.jvp(f, (x,), (tangent,))[1], f(tangent))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("regions", [3, 400])
def test_same_for_any_number_of_threads(name, regions):
    generator = torch.Generator().manual_seed(1)
    x, boxes = random_case(generator, 1, 49 * 5, 30, 30, regions)
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        y = x.clone().requires_grad_()
        out = pool(name, y, boxes, 7, 1.0)
        (out**2).sum().backward()
        results.append((out, y.grad))
    torch.set_num_threads(threads)
    for out, gradient in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(name, memory_format):
    x = features(memory_format)
    opcheck(operator(name), (x, REGIONS, 0.9, 3, 2, *EXTRA[name]))
    grad = torch.randn(4, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    opcheck(operator(f"{name}_backward"), (grad, REGIONS, 0.9, 3, 2, 2, 30, 9, 8, *EXTRA[name]))


@pytest.mark.parametrize("name", NAMES)
def test_compile_vmap_autocast(name):
    x = features()

    def f(x):
        return pool(name, x)

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))
    stacked = torch.stack([x, x + 1])
    assert torch.equal(torch.func.vmap(f)(stacked), torch.stack([f(s) for s in stacked]))
    gradient = torch.func.vmap(torch.func.grad(lambda x: (f(x) ** 2).sum()))(stacked)
    single = torch.stack([torch.func.grad(lambda x: (f(x) ** 2).sum())(s) for s in stacked])
    torch.testing.assert_close(gradient, single)
    with torch.autocast("cpu", torch.bfloat16):
        assert pool(name, x.bfloat16(), REGIONS.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_errors(name):
    x = features()
    with pytest.raises(RuntimeError, match="boxes: row 1 has batch index 2"):
        pool(name, x, torch.tensor([[0.0, 0, 0, 1, 1], [2, 0, 0, 1, 1]]))
    with pytest.raises(ValueError, match=r"input: expected channels that are a multiple of 4 \* 2.*got 30"):
        pool(name, x, output_size=(4, 2))
    with pytest.raises(ValueError, match="output_size"):
        pool(name, x, output_size=(0, 2))
    with pytest.raises(ValueError, match="boxes"):
        pool(name, x, REGIONS[:, :4])
    with pytest.raises(RuntimeError, match="input: expected a multiple of 8 channels, got 30"):
        operator(name)(x.detach(), REGIONS, 0.9, 4, 2, *EXTRA[name])
    grad = torch.zeros(4, 5, 3, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="grad: expected shape"):
        operator(f"{name}_backward")(grad, REGIONS, 0.9, 3, 2, 2, 31, 9, 8, *EXTRA[name])


def test_layers():
    x = features()
    align, psroi = fastcv.ops.PSRoIAlign((3, 2), 0.9, 2), fastcv.ops.PSRoIPool((3, 2), 0.9)
    assert torch.equal(align(x, REGIONS), pool("ps_roi_align", x))
    assert torch.equal(psroi(x, REGIONS), pool("ps_roi_pool", x))
    assert repr(align) == "PSRoIAlign(output_size=(3, 2), spatial_scale=0.9, sampling_ratio=2)"
    assert repr(psroi) == "PSRoIPool(output_size=(3, 2), spatial_scale=0.9)"
