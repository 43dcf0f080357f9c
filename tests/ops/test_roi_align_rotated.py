"""roi_align_rotated: by hand, against roi_align and the reference, derivatives, machinery, errors."""

import pytest
import torch
from roi_cases import FLOATS, FORMATS, TOLERANCE, one_thread
from torch.library import opcheck

import fastcv
from fastcv import reference
from fastcv.ops import roi_align, roi_align_rotated

REGIONS = torch.tensor(
    [[0, 4.3, 4.2, 6.7, 3.1, 30], [1, 1, 2, 4, 3.5, -75], [1, 2, 2, 0.2, 0.3, 10], [0, 60, 60, 7, 7, 45]],
    dtype=torch.float64,
)


def features(memory_format=torch.contiguous_format, channels=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 9, 8, dtype=torch.float64, generator=generator).to(dtype)
    return x.contiguous(memory_format=memory_format)


def random_case(generator, n, c, h, w, k, dtype):
    x = torch.randn(n, c, h, w, generator=generator, dtype=torch.float64).to(dtype)
    numbers = torch.rand(k, 5, generator=generator, dtype=torch.float64)
    scale = torch.tensor([1.2 * w, 1.2 * h, 0.8 * w, 0.8 * h, 720], dtype=torch.float64)
    image = torch.randint(max(n, 1), (k, 1), generator=generator)
    return x, torch.cat([image, numbers * scale - torch.tensor([0.1 * w, 0.1 * h, 0, 0, 360])], 1)


def test_by_hand():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    box = [2.0, 2, 4, 2]  # rows 1 and 2, of which 4 columns
    for angle, expected in ((0, [5, 6, 9, 10]), (180, [10, 9, 6, 5]), (360, [5, 6, 9, 10])):
        region = torch.tensor([[0, 2.0, 2, 2, 2, angle]])
        out = roi_align_rotated(x, region, 2, sampling_ratio=1)
        torch.testing.assert_close(out.flatten(), torch.tensor(expected).float(), atol=1e-5, rtol=0)
    # A quarter turn counter-clockwise: what is to the right of the region's frame lies up on the screen.
    turned = roi_align_rotated(x, torch.tensor([[0, *box, 90]]), (1, 2), sampling_ratio=1).flatten()
    torch.testing.assert_close(turned, torch.tensor([11.5, 3.5]), atol=1e-5, rtol=0)
    other = roi_align_rotated(x, torch.tensor([[0, *box, 90]]), (1, 2), sampling_ratio=1, clockwise=True).flatten()
    torch.testing.assert_close(other, turned.flip(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [2, -1])
def test_without_angle_is_roi_align(aligned, ratio):
    x, boxes = random_case(torch.Generator().manual_seed(1), 2, 6, 20, 30, 20, torch.float64)
    boxes[:, 5] = 0
    boxes[:, 3:5].clamp_(min=2)  # smaller ones are widened about their centres here, and to the lower right there
    centre, half = boxes[:, 1:3], boxes[:, 3:5] / 2
    upright = torch.cat([boxes[:, :1], centre - half, centre + half], 1)
    expected = roi_align(x, upright, (3, 4), 0.7, ratio, aligned)
    torch.testing.assert_close(roi_align_rotated(x, boxes, (3, 4), 0.7, ratio, aligned), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_reference(dtype, memory_format):
    generator = torch.Generator().manual_seed(1)
    for n, c, h, w, k, bins in ((1, 3, 9, 8, 6, (2, 3)), (3, 70, 14, 21, 6, (4, 3)), (2, 16, 24, 16, 2, (3, 1))):
        x, boxes = random_case(generator, n, c, h, w, k, dtype)
        x = x.contiguous(memory_format=memory_format)
        grad = torch.randn(k, c, *bins, generator=generator, dtype=torch.float64).to(dtype)
        grad = grad.contiguous(memory_format=memory_format)
        for rest in ((2, True, False), (-1, False, True)):
            constants = 0.9, *bins
            actual = torch.ops.fastcv.roi_align_rotated(x, boxes, *constants, *rest)
            gradient = torch.ops.fastcv.roi_align_rotated_backward(grad, boxes, *constants, *x.shape, *rest)
            with one_thread():
                expected = reference.roi_align_rotated.roi_align_rotated(x.double(), boxes, *constants, *rest)
                wanted = reference.roi_align_rotated.roi_align_rotated_backward(
                    grad.double(), boxes, *constants, *x.shape, *rest
                )
            assert actual.dtype == gradient.dtype == dtype
            assert actual.is_contiguous(memory_format=memory_format)
            assert gradient.is_contiguous(memory_format=memory_format)
            for have, want in ((actual, expected), (gradient, wanted)):
                tolerance = 8 * TOLERANCE[dtype] * max(1, float(want.abs().max()))
                torch.testing.assert_close(have.double(), want, atol=tolerance, rtol=0)


def test_bins_of_more_samples_than_fit():
    """More of a bin than are looked at together."""
    x, _ = random_case(torch.Generator().manual_seed(2), 1, 20, 60, 70, 1, torch.float32)
    boxes = torch.tensor([[0, 30.0, 30, 50, 44, 20]], dtype=torch.float64)
    for bins, ratio in ((1, -1), (2, 20)):
        expected = reference.roi_align_rotated.roi_align_rotated(x, boxes, 1.0, bins, bins, ratio, True, False)
        torch.testing.assert_close(roi_align_rotated(x, boxes, bins, 1.0, ratio), expected, atol=1e-5, rtol=0)


def test_regions_that_are_none():
    inf, nan = float("inf"), float("nan")
    x = torch.ones(1, 3, 4, 4)
    for box in ([nan, 0, 2, 2, 0], [0, 0, inf, 2, 0], [0, -inf, 2, 2, 0], [1, 1, -1, 2, 0], [2, 2, 2, 0, 0]):
        assert not roi_align_rotated(x, torch.tensor([[0.0, *box]]), 2).any()
    assert not roi_align_rotated(x, torch.tensor([[0.0, 2, 2, 2, 2, nan]]), 2).any()
    assert roi_align_rotated(x, torch.zeros(0, 6), 2).shape == (0, 3, 2, 2)
    assert not roi_align_rotated(torch.ones(1, 2, 0, 4), torch.tensor([[0.0, 1, 1, 3, 3, 5]]), 2).any()


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_derivatives(memory_format):
    x = features(memory_format, channels=2).requires_grad_()

    def pool(x):
        return roi_align_rotated(x, REGIONS, (2, 3), 0.9)

    assert torch.autograd.gradcheck(pool, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(pool, x)


def test_gradients_do_not_depend_on_threads():
    x, boxes = random_case(torch.Generator().manual_seed(3), 2, 150, 30, 30, 60, torch.float32)
    grad = torch.ones(60, 150, 4, 4)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        arguments = grad, boxes, 1.0, 4, 4, *x.shape, 2, True, False
        results.append(torch.ops.fastcv.roi_align_rotated_backward(*arguments))
    torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def lists():
    boxes = [REGIONS[:1, 1:].float(), REGIONS[1:3, 1:].float()]
    return boxes, torch.cat([torch.cat([torch.full((len(b), 1), float(i)), b], 1) for i, b in enumerate(boxes)])


def test_lists_and_layers():
    x, (boxes, rois) = features(dtype=torch.float32), lists()
    layer = fastcv.ops.RoIAlignRotated((3, 2), 0.5, 2)
    assert "output_size=(3, 2)" in repr(layer) and "clockwise=False" in repr(layer)
    assert torch.equal(layer(x, boxes), roi_align_rotated(x, rois, (3, 2), 0.5, 2))


def test_opcheck_compile_and_vmap():
    x, (_, rois) = features(dtype=torch.float32), lists()
    opcheck(torch.ops.fastcv.roi_align_rotated, (x.double().requires_grad_(), REGIONS, 0.9, 2, 3, 2, True, False))
    compiled = torch.compile(lambda x, b: roi_align_rotated(x, b, 2), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, rois), roi_align_rotated(x, rois, 2))
    mapped = torch.func.vmap(lambda x, b: roi_align_rotated(x, b, 2))(torch.stack([x, 2 * x]), torch.stack([rois] * 2))
    assert torch.equal(mapped, torch.stack([roi_align_rotated(x, rois, 2), roi_align_rotated(2 * x, rois, 2)]))


def test_errors():
    x = features()
    for error, match, arguments in (
        (TypeError, "input", (None, REGIONS, 2)),
        (ValueError, "boxes", (x, REGIONS[:, 1:], 2)),
        (TypeError, r"boxes: expected a Tensor \[K, 6\]", (x, None, 2)),
        (ValueError, "output_size", (x, REGIONS, 0)),
        (RuntimeError, "batch index 2", (x, torch.tensor([[2.0, 0, 0, 1, 1, 0]]), 2)),
        (RuntimeError, r"sampling_ratio: expected at most 2\^15", (x, REGIONS, 2, 1.0, 10**6)),
    ):
        with pytest.raises(error, match=match):
            roi_align_rotated(*arguments)
    with pytest.raises(RuntimeError, match="grad"):
        torch.ops.fastcv.roi_align_rotated_backward(x, REGIONS, 1.0, 2, 2, 2, 5, 9, 8, 2, True, False)
