"""roi_pool: by hand, against the reference, derivatives, machinery, errors."""

import pytest
import torch
from torch.library import opcheck

import fastcv
from fastcv import reference

FORMATS = (torch.contiguous_format, torch.channels_last)
REGIONS = torch.tensor(
    [[0, 1.3, 2.2, 7.7, 6.1], [1, -1, -2, 4, 3.5], [1, 2, 2, 2, 2], [0, 60, 60, 70, 70]], dtype=torch.float64
)


def pool(x):
    return fastcv.ops.roi_pool(x, REGIONS, (3, 2), 0.9)


def features(memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 9, 8, dtype=torch.float64, generator=generator)
    return x.contiguous(memory_format=memory_format).requires_grad_()


def test_by_hand():
    """Both corners belong to the region: pixels 0..3 in two bins of two."""
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    out, argmax = torch.ops.fastcv.roi_pool(x, torch.tensor([[0.0, 0, 0, 3, 3]]), 1.0, 2, 2)
    assert out.flatten().tolist() == [5, 7, 13, 15]
    assert argmax.flatten().tolist() == [5, 7, 13, 15]


def test_defined_semantics():
    inf, nan = float("inf"), float("nan")
    x = torch.full((1, 1, 2, 2), nan)
    assert pool_one(x, [0, 0, 0, 1, 1]) == -inf
    x[0, 0, 1, 0] = x[0, 0, 1, 1] = 3
    out, argmax = torch.ops.fastcv.roi_pool(x, torch.tensor([[0.0, 0, 0, 1, 1]]), 1.0, 1, 1)
    assert (out.item(), argmax.item()) == (3, 2)  # NaN never wins; the first of equals
    for region in ([0, 9, 9, 12, 12], [0, nan, 0, 1, 1], [0, 0, 0, inf, 1], [0, -1e12, 0, 1, 1]):
        assert pool_one(x, region) == 0


def pool_one(x, region):
    return fastcv.ops.roi_pool(x, torch.tensor([region], dtype=torch.float32), 1).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("channels", [1, 7, 16, 37, 130])
@pytest.mark.parametrize("regions", [0, 2, 40])
def test_reference(dtype, memory_format, channels, regions):
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(2, channels, 19, 33, generator=generator).to(dtype).contiguous(memory_format=memory_format)
    images = torch.randint(2, (regions, 1), generator=generator)
    boxes = torch.cat([images, torch.rand(regions, 4, generator=generator) * 90 - 15], 1)
    out, argmax = torch.ops.fastcv.roi_pool(x, boxes, 0.5, 3, 4)
    expected, expected_argmax = reference.roi_pool.roi_pool(x, boxes, 0.5, 3, 4)
    assert torch.equal(out, expected) and torch.equal(argmax, expected_argmax)
    assert out.is_contiguous(memory_format=memory_format)
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    rest = (0.5, 3, 4, *x.shape)
    gradient = torch.ops.fastcv.roi_pool_backward(grad, boxes, argmax, *rest)
    oracle = reference.roi_pool.roi_pool_backward(grad.double(), boxes, argmax, *rest)
    tolerance = 2 * torch.finfo(dtype).eps * oracle.abs().max().clamp(min=1) if regions else 0
    assert ((gradient.double() - oracle).abs() <= tolerance).all()


def test_strides_and_expanded_gradients():
    x = features()
    sliced = torch.cat([x, x], 3).detach()[:, ::2, :, 1::2].requires_grad_()
    pool(sliced).sum().backward()
    dense = sliced.detach().clone().requires_grad_()
    pool(dense).sum().backward()
    assert torch.equal(pool(sliced), pool(dense))
    assert torch.equal(sliced.grad, dense.grad)


def test_derivatives():
    x = features()
    assert torch.autograd.gradcheck(pool, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(pool, x)
    tangent = torch.ones_like(x)
    assert torch.func.jvp(pool, (x,), (tangent,))[1].sum() == (pool(x) != 0).sum()
    assert torch.func.hessian(lambda x: (pool(x) ** 2).sum())(x).abs().sum() > 0


def test_same_for_any_number_of_threads():
    x = torch.randn(1, 64, 40, 40, generator=torch.Generator().manual_seed(1))
    boxes = torch.rand(200, 5, generator=torch.Generator().manual_seed(2)) * 40
    boxes[:, 0] = 0
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        y = x.clone().requires_grad_()
        (fastcv.ops.roi_pool(y, boxes, 7) ** 2).sum().backward()
        results.append(y.grad)
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format):
    x = features(memory_format)
    out, argmax = torch.ops.fastcv.roi_pool(x, REGIONS, 0.9, 3, 2)
    opcheck(torch.ops.fastcv.roi_pool, (x, REGIONS, 0.9, 3, 2))
    grad = torch.randn_like(out).detach().requires_grad_()
    opcheck(torch.ops.fastcv.roi_pool_backward, (grad, REGIONS, argmax, 0.9, 3, 2, 2, 5, 9, 8))


def test_compile_vmap_autocast():
    x = features()
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), pool(x))
    stacked = torch.stack([x, x + 1])
    assert torch.equal(torch.func.vmap(pool)(stacked), torch.stack([pool(s) for s in stacked]))
    with torch.autocast("cpu", torch.bfloat16):
        assert fastcv.ops.roi_pool(x.bfloat16(), REGIONS.float(), 2).dtype == torch.bfloat16


def test_errors():
    x = features()
    with pytest.raises(RuntimeError, match="boxes: row 1 has batch index 2"):
        fastcv.ops.roi_pool(x, torch.tensor([[0.0, 0, 0, 1, 1], [2, 0, 0, 1, 1]]), 2)
    with pytest.raises(ValueError, match="output_size"):
        fastcv.ops.roi_pool(x, REGIONS, (0, 2))
    with pytest.raises(ValueError, match="boxes"):
        fastcv.ops.roi_pool(x, REGIONS[:, :4], 2)
    argmax = torch.full((4, 5, 3, 2), 72, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="argmax"):
        grad = torch.zeros(4, 5, 3, 2, dtype=torch.float64)
        torch.ops.fastcv.roi_pool_backward(grad, REGIONS, argmax, 0.9, 3, 2, 2, 5, 9, 8)


def test_layer():
    layer = fastcv.ops.RoIPool((3, 2), 0.9)
    assert torch.equal(layer(features(), REGIONS), pool(features()))
    assert repr(layer) == "RoIPool(output_size=(3, 2), spatial_scale=0.9)"
