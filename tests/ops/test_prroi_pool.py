"""prroi_pool: by hand, against sums of samples and the reference, derivatives, machinery, errors."""

import pytest
import torch
from roi_cases import FLOATS, FORMATS, TOLERANCE, one_thread, random_case
from torch.library import opcheck

import fastcv
from fastcv import reference
from fastcv.ops import prroi_pool

REGIONS = torch.tensor(
    [[0, 1.3, 2.2, 7.7, 6.1], [1, -1.7, -2.4, 4.1, 3.5], [1, 2.1, 2.2, 2.6, 2.9], [0, 60, 60, 70, 70]],
    dtype=torch.float64,
)


def features(memory_format=torch.contiguous_format, channels=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 9, 8, dtype=torch.float64, generator=generator).to(dtype)
    return x.contiguous(memory_format=memory_format)


def by_samples(x, box, height, width, scale=1.0, count=4000):
    """Of one region of one image: the mean of many samples of the interpolated map, which is 0 outside."""

    def axis(low, high, size, bins):
        at = scale * (low + (high - low) * (torch.arange(count * bins, dtype=torch.float64) + 0.5) / (count * bins))
        weights = (1 - (at[:, None] - torch.arange(size)).abs()).clamp(min=0)
        return weights.view(bins, count, size).mean(1)

    x1, y1, x2, y2 = box
    return axis(y1, y2, x.shape[1], height) @ x.double() @ axis(x1, x2, x.shape[2], width).T


def test_by_hand():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    # Linear inside, so that a bin is what its centre is.
    assert prroi_pool(x, torch.tensor([[0.0, 0.5, 1, 2.5, 2]]), (1, 2)).flatten().tolist() == [7, 8]
    # Half of the hat of one pixel, and what lies beyond the border.
    one = torch.zeros(1, 1, 3, 3)
    one[0, 0, 0, 1] = 1
    assert prroi_pool(one, torch.tensor([[0.0, 1, 0, 2, 1]]), 1).item() == 0.25
    assert prroi_pool(one, torch.tensor([[0.0, 0, -1, 2, 0]]), 1).item() == 0.25
    assert prroi_pool(one, torch.tensor([[0.0, 0, -3, 2, -1]]), 1).item() == 0
    # Within one pixel, and of no extent.
    assert prroi_pool(one, torch.tensor([[0.0, 1, 0, 1.5, 0.5]]), 1).item() == pytest.approx(0.75**2)
    assert prroi_pool(one, torch.tensor([[0.0, 1, 0, 1, 2]]), 1).item() == 0


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_is_the_limit_of_samples(scale):
    x = features(channels=3)
    for roi in REGIONS:
        box = roi[1:] / scale
        actual = prroi_pool(x, torch.cat([roi[:1], box])[None], (3, 2), scale)[0]
        torch.testing.assert_close(actual, by_samples(x[int(roi[0])], box, 3, 2, scale), atol=1e-6, rtol=0)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_reference(dtype, memory_format):
    generator = torch.Generator().manual_seed(1)
    for n, c, h, w, k, bins in ((1, 3, 9, 8, 6, (2, 3)), (3, 37, 20, 31, 4, (5, 4)), (2, 16, 20, 16, 3, (3, 1))):
        x, boxes = random_case(generator, n, c, h, w, k, dtype)
        x = x.contiguous(memory_format=memory_format)
        grad = torch.randn(k, c, *bins, generator=generator, dtype=torch.float64).to(dtype)
        for part in range(5):
            constants = 0.9, *bins
            actual = torch.ops.fastcv.prroi_pool(x, boxes, *constants, part)
            gradient = torch.ops.fastcv.prroi_pool_backward(grad, boxes, *constants, *x.shape, part)
            with one_thread():
                expected = reference.prroi_pool.prroi_pool(x.double(), boxes, *constants, part)
                wanted = reference.prroi_pool.prroi_pool_backward(grad.double(), boxes, *constants, *x.shape, part)
            assert actual.dtype == gradient.dtype == dtype
            for have, want in ((actual, expected), (gradient, wanted)):
                tolerance = 4 * TOLERANCE[dtype] * max(1, float(want.abs().max()))
                torch.testing.assert_close(have.double(), want, atol=tolerance, rtol=0)


def test_float32_coordinates_of_small_bins():
    """The integral over a bin is not a difference of large numbers."""
    x = features(dtype=torch.float32)
    boxes = torch.tensor([[0, 3.3, 4.1, 3.301, 4.102], [1, 2.9999, 2.9999, 3.0001, 3.0001]])
    expected = prroi_pool(x.double(), boxes.double(), 2)
    torch.testing.assert_close(prroi_pool(x, boxes, 2).double(), expected, atol=1e-5, rtol=1e-5)


def test_regions_that_are_none():
    inf, nan = float("inf"), float("nan")
    x = torch.ones(1, 3, 4, 4)
    for box in ([nan, 0, 2, 2], [0, 0, inf, 2], [0, -inf, 2, 2], [0, 0, 2, 3e38], [2, 1, 1, 3], [1, 1, 1, 1]):
        boxes = torch.tensor([[0.0, *box]], requires_grad=True)
        out = prroi_pool(x, boxes, 2)
        assert not out.any()
        assert not torch.autograd.grad(out.sum(), boxes)[0].any()
    assert prroi_pool(x, torch.zeros(0, 5), 2).shape == (0, 3, 2, 2)
    assert prroi_pool(torch.ones(1, 0, 4, 4), torch.zeros(1, 5), 2).shape == (1, 0, 2, 2)
    assert not prroi_pool(torch.ones(1, 2, 0, 4), torch.tensor([[0.0, 0, 0, 3, 3]]), 2).any()


def test_huge_regions_stay_in_bounds():
    x = torch.ones(1, 2, 5, 700)
    boxes = torch.tensor([[0.0, -9e8, -9e8, 9e8, 9e8], [0, 3e7, 3e7, 9e8, 9e8], [0, -4e7, 0, 4e7, 9]])
    for dtype in (torch.float32, torch.float64):
        out = prroi_pool(x, boxes.to(dtype), (2, 3))
        expected = reference.prroi_pool.prroi_pool(x, boxes.to(dtype), 1.0, 2, 3, 0)
        torch.testing.assert_close(out, expected)
        torch.ops.fastcv.prroi_pool_backward(out, boxes.to(dtype), 1.0, 2, 3, *x.shape, 0)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_derivatives(memory_format):
    x = features(memory_format, channels=2).requires_grad_()
    boxes = REGIONS.clone().requires_grad_()

    def of_boxes(x, coordinates):
        return prroi_pool(x, torch.cat([boxes[:, :1].detach(), coordinates], 1), (2, 3), 0.9)

    inputs = x, boxes[:, 1:].detach().requires_grad_()
    assert torch.autograd.gradcheck(of_boxes, inputs, check_forward_ad=True, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(lambda x: prroi_pool(x, REGIONS, (2, 3), 0.9), x)

    # The gradient of the features depends on the boxes, and that of the boxes on the features.
    grad = torch.randn(4, 2, 2, 3, dtype=torch.float64)

    def gradient(x, coordinates):
        rois = torch.cat([REGIONS[:, :1], coordinates], 1)
        return torch.ops.fastcv.prroi_pool_backward(grad, rois, 0.9, 2, 3, *x.shape, 0) * x

    assert torch.autograd.gradcheck(gradient, inputs, check_forward_ad=True, check_batched_grad=False)


def test_second_derivatives_by_boxes_are_refused():
    x, boxes = features().requires_grad_(), REGIONS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(prroi_pool(x, boxes, 2).sum(), boxes, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives with respect to boxes"):
        gradient.sum().backward()


def test_gradients_do_not_depend_on_threads():
    x, boxes = random_case(torch.Generator().manual_seed(3), 2, 20, 30, 30, 60)
    grad = torch.ones(60, 20, 4, 4)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.ops.fastcv.prroi_pool_backward(grad, boxes, 1.0, 4, 4, *x.shape, 0))
    torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def lists():
    boxes = [REGIONS[:1, 1:].float(), REGIONS[1:3, 1:].float()]
    return boxes, torch.cat([torch.cat([torch.full((len(b), 1), float(i)), b], 1) for i, b in enumerate(boxes)])


def test_lists_and_layers():
    x, (boxes, rois) = features(dtype=torch.float32), lists()
    layer = fastcv.ops.PrRoIPool((3, 2), 0.5)
    assert "output_size=(3, 2)" in repr(layer)
    assert torch.equal(layer(x, boxes), prroi_pool(x, rois, (3, 2), 0.5))


def test_opcheck_compile_and_vmap():
    x, (_, rois) = features(dtype=torch.float32), lists()
    opcheck(torch.ops.fastcv.prroi_pool, (x.double().requires_grad_(), REGIONS.clone().requires_grad_(), 0.9, 2, 3, 0))
    compiled = torch.compile(lambda x, b: prroi_pool(x, b, 2), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, rois), prroi_pool(x, rois, 2))
    mapped = torch.func.vmap(lambda x, b: prroi_pool(x, b, 2))(torch.stack([x, 2 * x]), torch.stack([rois, rois]))
    assert torch.equal(mapped, torch.stack([prroi_pool(x, rois, 2), prroi_pool(2 * x, rois, 2)]))


def test_errors():
    x = features()
    for error, match, arguments in (
        (TypeError, "input", (None, REGIONS, 2)),
        (ValueError, "input", (x[0], REGIONS, 2)),
        (ValueError, "boxes", (x, REGIONS[:, 1:], 2)),
        (ValueError, "boxes", (x, [REGIONS[:, 1:]], 2)),
        (ValueError, "output_size", (x, REGIONS, 0)),
        (RuntimeError, "batch index 2", (x, torch.tensor([[2.0, 0, 0, 1, 1]]), 2)),
    ):
        with pytest.raises(error, match=match):
            prroi_pool(*arguments)
    with pytest.raises(RuntimeError, match="part: expected 0 to 4, got 5"):
        torch.ops.fastcv.prroi_pool(x, REGIONS, 1.0, 2, 2, 5)
    with pytest.raises(RuntimeError, match="grad"):
        torch.ops.fastcv.prroi_pool_backward(x, REGIONS, 1.0, 2, 2, 2, 5, 9, 8, 0)
