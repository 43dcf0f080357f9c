import itertools

import pytest
import torch

from fastcv.ops.boxes import (
    box_area,
    box_convert,
    clip_boxes_to_image,
    masks_to_boxes,
    remove_small_boxes,
)

AXIS_ALIGNED = ("xyxy", "xywh", "cxcywh")
ROTATED = ("xywhr", "cxcywhr", "xyxyxyxy")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def random_boxes(generator, *shape, dtype=torch.float32, columns=4):
    """Coordinates around zero: proper, inverted, thin and empty boxes alike."""
    boxes = torch.randint(-20, 21, (*shape, columns), generator=generator).double()
    if dtype.is_floating_point:
        boxes += torch.rand(boxes.shape, generator=generator, dtype=torch.float64).round(decimals=1)
    elif dtype is torch.uint8:
        boxes = boxes.abs()
    return boxes.to(dtype)


# ---- by hand -------------------------------------------------------------------------------------


def test_area_by_hand():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 3.0], [1.0, 1.0, 1.0, 9.0], [2.0, 0.0, 0.0, 3.0]])
    assert box_area(boxes).tolist() == [6, 0, -6]
    assert box_area(torch.tensor([[7.0, 8.0, 2.0, 3.0]]), "xywh").tolist() == [6]
    assert box_area(torch.tensor([[7.0, 8.0, 2.0, 3.0]]), fmt="cxcywh").tolist() == [6]


def test_convert_by_hand():
    values = {
        "xyxy": [1.0, 2.0, 5.0, 9.0],
        "xywh": [1.0, 2.0, 4.0, 7.0],
        "cxcywh": [3.0, 5.5, 4.0, 7.0],
    }
    for a, b in itertools.product(values, repeat=2):
        assert box_convert(torch.tensor([values[a]]), a, b).tolist() == [values[b]], (a, b)


def test_convert_rotated_by_hand():
    # Width 4, height 2, turned by 90 degrees counter-clockwise: from (0, 0) the width goes up the
    # screen to (0, -4), then the height to the right to (2, -4).
    values = {
        "xywhr": [0.0, 0.0, 4.0, 2.0, 90.0],
        "cxcywhr": [1.0, -2.0, 4.0, 2.0, 90.0],
        "xyxyxyxy": [0.0, 0.0, 0.0, -4.0, 2.0, -4.0, 2.0, 0.0],
    }
    for a, b in itertools.product(values, repeat=2):
        result = box_convert(torch.tensor(values[a]), a, b)
        torch.testing.assert_close(result, torch.tensor(values[b]), atol=1e-6, rtol=0)


def test_clip_by_hand():
    boxes = torch.tensor([[-1.0, -2.0, 5.0, 30.0], [50.0, 60.0, 70.0, 80.0]])
    assert clip_boxes_to_image(boxes, (10, 20)).tolist() == [[0, 0, 5, 10], [20, 10, 20, 10]]
    assert boxes[0, 0] == -1
    bytes_ = torch.tensor([[3, 7, 200, 255]], dtype=torch.uint8)
    assert clip_boxes_to_image(bytes_, (1000, 100)).tolist() == [[3, 7, 100, 255]]
    polygon = torch.tensor([[-1.0, 3.0, 25.0, 4.0, 7.0, 11.0]])
    assert clip_boxes_to_image(polygon, (10, 20)).tolist() == [[0, 3, 20, 4, 7, 10]]


def test_remove_small_by_hand():
    boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0], [0.0, 0.0, 4.0, 9.0], [3.0, 3.0, 2.0, 2.0]])
    assert remove_small_boxes(boxes, 5).tolist() == [0]
    assert remove_small_boxes(boxes, 0.0).tolist() == [0, 1]
    assert remove_small_boxes(boxes * float("nan"), -1.0).tolist() == []


def test_masks_by_hand():
    masks = torch.zeros(4, 6, 7, dtype=torch.bool)
    masks[0, 2:4, 3:6] = True
    masks[1, 0, 0] = True
    masks[2, 5, 6] = True  # masks[3] has no pixel
    expected = [[3, 2, 5, 3], [0, 0, 0, 0], [6, 5, 6, 5], [0, 0, 0, 0]]
    for dtype in (torch.bool, torch.uint8, torch.int64, *FLOATS):
        boxes = masks_to_boxes(masks.to(dtype))
        assert boxes.dtype is torch.float32 and boxes.tolist() == expected
    assert masks_to_boxes(-0.5 * masks.float()).tolist() == expected


# ---- properties ----------------------------------------------------------------------------------


def test_area_does_not_overflow():
    assert box_area(torch.tensor([[0, 0, 200, 250]], dtype=torch.uint8)).tolist() == [50000]
    assert box_area(torch.tensor([[0.0, 0.0, 900.0, 900.0]]).half()).tolist() == [810000]
    # An inverted box of unsigned coordinates has a negative width, not one of 254.
    inverted = torch.tensor([[5, 5, 3, 3]], dtype=torch.uint8)
    assert remove_small_boxes(inverted, 1.0).tolist() == []
    assert box_convert(torch.tensor([[200, 0, 250, 2]], dtype=torch.uint8), "xyxy", "cxcywh")[
        0, 0
    ].item() == pytest.approx(225)


@pytest.mark.parametrize("formats", [AXIS_ALIGNED, ROTATED])
def test_convert_round_trip(formats):
    generator = torch.Generator().manual_seed(0)
    start = random_boxes(generator, 50, 3, dtype=torch.float64, columns=5 if "xywhr" in formats else 4)
    if "xywhr" in formats:
        start[..., 2:4] = start[..., 2:4].abs() + 1
        start[..., 4] *= 8  # degrees in [-160, 168]
    for a, b in itertools.product(formats, repeat=2):
        boxes = box_convert(start, formats[1], a)
        back = box_convert(box_convert(boxes, a, b), b, a)
        torch.testing.assert_close(back, boxes, atol=1e-9, rtol=0)


def test_convert_returns_new_memory_and_gradients():
    boxes = torch.tensor([[1.0, 2.0, 5.0, 9.0]], dtype=torch.float64, requires_grad=True)
    same = box_convert(boxes, "xyxy", "xyxy")
    assert same.data_ptr() != boxes.data_ptr()
    rotated = torch.tensor([[1.0, 2.0, 5.0, 9.0, 33.0]], dtype=torch.float64, requires_grad=True)
    for a, b in (("xywhr", "cxcywhr"), ("xywhr", "xyxyxyxy"), ("cxcywhr", "xyxyxyxy")):
        assert torch.autograd.gradcheck(lambda x, a=a, b=b: box_convert(x, a, b), rotated)
    for a, b in itertools.permutations(AXIS_ALIGNED, 2):
        assert torch.autograd.gradcheck(lambda x, a=a, b=b: box_convert(x, a, b), boxes)


def test_masks_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        shape = torch.randint(1, 12, (3,), generator=generator).tolist()
        masks = torch.rand(shape, generator=generator) > 0.9
        for mask, box in zip(masks, masks_to_boxes(masks), strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            expected = [0, 0, 0, 0]
            if len(rows):
                expected = [columns.min(), rows.min(), columns.max(), rows.max()]
            assert box.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_masks_need_little_memory(dtype):
    """O(N (H + W)): no temporary as large as the masks, let alone int64 coordinates of them."""
    masks = torch.zeros(4, 400, 500, dtype=dtype)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=activities) as profile:
        masks_to_boxes(masks)
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    assert 0 < allocated < masks.numel() / 4


def test_empty():
    none = torch.zeros(0, 4)
    assert box_area(none).shape == (0,)
    assert box_convert(none, "xyxy", "cxcywh").shape == (0, 4)
    assert box_convert(torch.zeros(0, 5), "cxcywhr", "xyxyxyxy").shape == (0, 8)
    assert clip_boxes_to_image(none, (4, 4)).shape == (0, 4)
    assert remove_small_boxes(none, 1.0).shape == (0,)
    assert masks_to_boxes(torch.zeros(0, 5, 5)).shape == (0, 4)
    assert masks_to_boxes(torch.zeros(3, 0, 5)).tolist() == [[0] * 4] * 3
    assert masks_to_boxes(torch.zeros(0)).shape == (0, 4)


def test_compiles_and_exports():
    class Model(torch.nn.Module):
        def forward(self, boxes, masks):
            boxes = clip_boxes_to_image(box_convert(boxes, "xywh", "xyxy"), (10, 20))
            return boxes, box_area(boxes), masks_to_boxes(masks)

    boxes = torch.tensor([[-1.0, -2.0, 5.0, 30.0], [3.0, 3.0, 2.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    masks = torch.eye(6).reshape(3, 2, 6)
    expected = Model()(boxes, masks)
    compiled = torch.compile(Model(), backend="eager", fullgraph=True)
    rows = torch.export.Dim("rows")
    exported = torch.export.export(Model(), (boxes[:2], masks[:2]), dynamic_shapes=({0: rows}, {0: rows}))
    for model in (compiled, exported.module()):
        torch.testing.assert_close(model(boxes, masks), expected, atol=0, rtol=0)


# ---- against torchvision -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_like_torchvision(dtype):
    tv = pytest.importorskip("torchvision").ops
    generator = torch.Generator().manual_seed(2)
    for shape in [(0,), (1,), (7,), (5, 3), (2, 3, 4), ()] * 4:
        boxes = random_boxes(generator, *shape, dtype=dtype)
        if dtype is torch.uint8:  # torchvision's differences would wrap around
            boxes = boxes.sort(dim=-1).values
        for fmt in AXIS_ALIGNED:
            torch.testing.assert_close(box_area(boxes, fmt), tv.box_area(boxes, fmt))
        for a, b in itertools.product(AXIS_ALIGNED, repeat=2):
            expected = tv.box_convert(boxes, a, b)
            torch.testing.assert_close(box_convert(boxes, a, b), expected, atol=1e-5, rtol=1e-2)
        size = tuple(torch.randint(0, 30, (2,), generator=generator).tolist())
        if boxes.numel() or dtype.is_floating_point:
            expected = tv.clip_boxes_to_image(boxes, size)
            assert torch.equal(clip_boxes_to_image(boxes, size), expected)
        if boxes.ndim == 2:
            for min_size in (0, 0.1, 2, 5.0):
                expected = tv.remove_small_boxes(boxes, min_size)
                assert torch.equal(remove_small_boxes(boxes, min_size), expected)


@pytest.mark.parametrize("dtype", (*FLOATS, torch.int32, torch.int64))
def test_rotated_conversion_like_torchvision(dtype):
    tv = pytest.importorskip("torchvision").ops
    generator = torch.Generator().manual_seed(3)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-9, torch.float16: 0.1}.get(dtype, 1.0)
    for fmt, other, shape in itertools.product(ROTATED, ROTATED, [(0,), (1,), (40,), (5, 3), ()]):
        boxes = random_boxes(generator, *shape, dtype=dtype, columns=8 if fmt == "xyxyxyxy" else 5)
        expected = tv.box_convert(boxes, fmt, other)
        result = box_convert(boxes, fmt, other)
        torch.testing.assert_close(result, expected, atol=tolerance, rtol=1e-2)
        if not dtype.is_floating_point:  # rounding .5 either way aside, the same integers
            assert (result != expected).float().mean().nan_to_num() < 0.02


def test_masks_like_torchvision():
    tv = pytest.importorskip("torchvision").ops
    generator = torch.Generator().manual_seed(4)
    for i in range(200):
        shape = torch.randint(1, 9, (3,), generator=generator).tolist()
        masks = torch.randint(-1, 2, shape, generator=generator) * (torch.rand(shape) > 0.8)
        masks = masks.to((torch.float32, torch.bool, torch.uint8, torch.int64)[i % 4])
        expected = tv.masks_to_boxes(masks)
        torch.testing.assert_close(masks_to_boxes(masks), expected, atol=0, rtol=0)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: box_area([[0, 0, 1, 1]]), TypeError, "boxes.*Tensor.*list"),
        (lambda: box_area(torch.zeros(2, 3)), ValueError, r"boxes.*at least 4.*\[2, 3\]"),
        (lambda: box_area(torch.zeros(2, 4), "xywhr"), ValueError, "fmt.*'xywhr'"),
        (lambda: box_convert(torch.zeros(2, 4), "XYXY", "xywh"), ValueError, "in_fmt.*'XYXY'"),
        (lambda: box_convert(torch.zeros(2, 4), "xyxy", "yx"), ValueError, "out_fmt.*'yx'"),
        (lambda: box_convert(torch.zeros(2, 5), "xyxy", "xywh"), ValueError, r"boxes.*4.*\[2, 5\]"),
        (lambda: box_convert(torch.zeros(2, 4), "xywhr", "xywhr"), ValueError, r"5.*\[2, 4\]"),
        (lambda: box_convert(torch.zeros(2, 4), "xyxy", "xywhr"), NotImplementedError, "xywhr"),
        (lambda: clip_boxes_to_image(torch.zeros(2, 5), (1, 1)), ValueError, r"pairs.*\[2, 5\]"),
        (lambda: clip_boxes_to_image(torch.zeros(2, 4), (1, 2, 3)), ValueError, r"size.*1, 2, 3"),
        (lambda: clip_boxes_to_image(torch.zeros(2, 4), (-1, 2)), ValueError, "size.*at least 0"),
        (lambda: remove_small_boxes(torch.zeros(1, 2, 4), 1), ValueError, r"\[N, 4\].*\[1, 2, 4\]"),
        (lambda: remove_small_boxes(None, 1), TypeError, "boxes.*Tensor.*NoneType"),
        (lambda: masks_to_boxes(torch.zeros(4, 4)), ValueError, r"\[N, H, W\].*\[4, 4\]"),
        (lambda: masks_to_boxes([]), TypeError, "masks.*Tensor.*list"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
