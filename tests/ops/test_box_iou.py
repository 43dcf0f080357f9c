import itertools
import math

import pytest
import torch

from fastcv.ops.box_iou import (
    box_iou,
    complete_box_iou,
    distance_box_iou,
    generalized_box_iou,
)
from fastcv.ops.boxes import box_convert

ALL = (box_iou, generalized_box_iou, distance_box_iou, complete_box_iou)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def proper_boxes(generator, n, dtype=torch.float32):
    """x1 <= x2 and y1 <= y2, some of no width or height, coordinates of both signs."""
    boxes = torch.rand((n, 4), generator=generator, dtype=torch.float64) * 40
    boxes[:, 2:] = boxes[:, :2] + (boxes[:, 2:] - 4).clamp(min=0)
    if dtype.is_floating_point:
        boxes -= 20
    return boxes.to(dtype)


def overlapping_boxes(generator, n, dtype=torch.float32):
    """Wide enough that no derivative is taken at a kink."""
    boxes = torch.rand((n, 4), generator=generator, dtype=torch.float64) * 9
    boxes[:, 2:] += boxes[:, :2] + 1
    return boxes.to(dtype)


# ---- by hand -------------------------------------------------------------------------------------


def test_by_hand():
    #   0 1 2 3      a = [0, 0, 2, 2], b = [1, 1, 3, 3]: they share 1 of 7, their hull has 9, the
    # 0 a a .        centres are (1, 1) apart, the hull's diagonal is (3, 3).
    # 1 a ab b
    # 2 . b b
    a, b = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 1.0, 3.0, 3.0]])
    assert box_iou(a, b).item() == pytest.approx(1 / 7)
    assert generalized_box_iou(a, b).item() == pytest.approx(1 / 7 - 2 / 9)
    assert distance_box_iou(a, b).item() == pytest.approx(1 / 7 - 2 / 18)
    assert complete_box_iou(a, b).item() == pytest.approx(1 / 7 - 2 / 18)
    # 2 x 2 in 2 x 4: half of it, centres (0, 1) apart, diagonal (2, 4), ratios 1 and 1/2.
    b = torch.tensor([[0.0, 0.0, 2.0, 4.0]])
    v = 4 / math.pi**2 * (math.atan(1) - math.atan(1 / 2)) ** 2
    expected = 1 / 2 - 1 / 20 - v * v / (1 - 1 / 2 + v)
    assert complete_box_iou(a, b).item() == pytest.approx(expected)
    # The same boxes in the other formats.
    a, b = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 1.0, 2.0, 2.0]])
    assert box_iou(a, b, "xywh").item() == pytest.approx(1 / 7)
    a, b = torch.tensor([[1.0, 1.0, 2.0, 2.0]]), torch.tensor([[2.0, 2.0, 2.0, 2.0]])
    assert box_iou(a, b, fmt="cxcywh").item() == pytest.approx(1 / 7)


def test_degenerate_boxes_by_hand():
    point = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    box = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    line = torch.tensor([[0.0, 1.0, 2.0, 1.0]])
    for function in ALL:  # torchvision: NaN
        assert function(point, point).item() == 0
        assert function(line, line).item() == 0
        assert function(point, box).isfinite().all()
    assert box_iou(point, box).item() == 0
    assert generalized_box_iou(point, box).item() == 0
    inverted = torch.tensor([[2.0, 2.0, 0.0, 0.0]])
    assert box_iou(inverted, box).item() == 0
    assert generalized_box_iou(inverted, inverted).item() == 0  # torchvision: inf


@pytest.mark.parametrize("function", ALL)
def test_nan_shows(function):
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, math.nan, 2.0, 2.0]])
    assert function(boxes, boxes).isnan().tolist() == [[False, True], [True, True]]


# ---- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
@pytest.mark.parametrize("function", ALL)
def test_range_symmetry_identity(function, dtype):
    boxes = proper_boxes(torch.Generator().manual_seed(0), 40, dtype)
    result = function(boxes, boxes)
    assert result.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert torch.equal(result, result.T)
    lowest = {box_iou: 0, complete_box_iou: -1.5}.get(function, -1)
    assert lowest <= result.min() and result.max() <= 1
    area = (boxes[:, 2] - boxes[:, 0]).double() * (boxes[:, 3] - boxes[:, 1]).double()
    assert (result.diag()[area > 0] == 1).all()


def test_half_and_integer_boxes_are_computed_in_float32():
    big = torch.tensor([[0, 0, 1000, 1000], [0, 0, 1000, 500]])
    for dtype in (torch.float16, torch.bfloat16, torch.int16):
        assert box_iou(big.to(dtype), big.to(dtype))[0, 1].item() == pytest.approx(0.5, abs=2e-3)
    huge = 100 * big.int()  # the areas do not fit into int32
    expected = torch.tensor([[1, 0.5], [0.5, 1]])
    torch.testing.assert_close(box_iou(huge, huge), expected)
    torch.testing.assert_close(generalized_box_iou(huge, huge), expected)
    assert box_iou(big.half(), big.double()).dtype is torch.float64
    assert box_iou(big, big.half()).dtype is torch.float32


def test_leading_dimensions():
    generator = torch.Generator().manual_seed(1)
    boxes1 = proper_boxes(generator, 12).reshape(3, 4, 4)
    boxes2 = proper_boxes(generator, 5)
    for function in ALL:
        expected = torch.stack([function(b, boxes2) for b in boxes1])
        assert torch.equal(function(boxes1, boxes2), expected)
        assert torch.equal(function(boxes1, boxes2.expand(3, 5, 4)), expected)
        assert function(boxes1[0, 0], boxes2).shape == (1, 5)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)])
def test_empty(sizes):
    n, m = sizes
    for function in ALL:
        boxes1 = torch.zeros(n, 4, requires_grad=True)
        result = function(boxes1, torch.zeros(m, 4))
        assert result.shape == (n, m) and result.dtype is torch.float32
        result.sum().backward()
        assert boxes1.grad.shape == (n, 4)


@pytest.mark.parametrize("function", [box_iou, generalized_box_iou, distance_box_iou])
def test_derivatives(function):
    generator = torch.Generator().manual_seed(2)
    boxes1, boxes2 = (overlapping_boxes(generator, n, torch.float64) for n in (4, 3))
    inputs = (boxes1.requires_grad_(), boxes2.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)


def test_derivative_of_complete_box_iou_holds_the_weight_constant():
    generator = torch.Generator().manual_seed(3)
    boxes1 = overlapping_boxes(generator, 3, torch.float64).requires_grad_()
    boxes2 = overlapping_boxes(generator, 3, torch.float64)

    def angle(boxes):
        width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
        return torch.atan(width / height)

    def v(boxes):
        return 4 / math.pi**2 * (angle(boxes)[:, None] - angle(boxes2)[None]) ** 2

    alpha = v(boxes1).detach() / (1 - box_iou(boxes1, boxes2).detach() + v(boxes1).detach() + 1e-7)
    expected = distance_box_iou(boxes1, boxes2) - alpha * v(boxes1)
    result = complete_box_iou(boxes1, boxes2)
    torch.testing.assert_close(result, expected)
    gradients = [torch.autograd.grad(y.sum(), boxes1)[0] for y in (result, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:.*jit.script.*")  # torch's own, in forward mode
def test_degenerate_boxes_have_finite_derivatives():
    degenerate = [[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 2.0, 1.0], [1.0, 0.0, 1.0, 2.0], [0, 0, 2, 2]]
    for function in ALL:
        boxes = torch.tensor(degenerate, requires_grad=True)
        function(boxes, boxes.detach()).sum().backward()
        assert boxes.grad.isfinite().all(), function
        boxes = boxes.detach()
        _, tangent = torch.func.jvp(lambda x, f=function, y=boxes: f(x, y), (boxes,), (torch.ones_like(boxes),))
        assert tangent.isfinite().all(), function


def test_compiles_and_exports():
    class Model(torch.nn.Module):
        def forward(self, boxes):
            return [function(boxes, boxes) for function in ALL]

    boxes = proper_boxes(torch.Generator().manual_seed(9), 6)
    expected = Model()(boxes)
    compiled = torch.compile(Model(), backend="eager", fullgraph=True)
    rows = torch.export.Dim("rows")
    exported = torch.export.export(Model(), (boxes[:3],), dynamic_shapes=({0: rows},)).module()
    for model in (compiled, exported):
        torch.testing.assert_close(model(boxes), expected, atol=1e-6, rtol=0)


# ---- against torchvision -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
@pytest.mark.parametrize("name", [function.__name__ for function in ALL])
def test_like_torchvision(name, dtype):
    tv = pytest.importorskip("torchvision").ops
    function, theirs = globals()[name], getattr(tv, name)
    generator = torch.Generator().manual_seed(10)
    for n, m in itertools.product((0, 1, 2, 5, 9), repeat=2):
        boxes1, boxes2 = proper_boxes(generator, n, dtype), proper_boxes(generator, m, dtype)
        options = [()] + [(0.5,)] * ("distance" in name or "complete" in name)
        for eps in options:
            result = function(boxes1, boxes2, *eps)
            assert result.isfinite().all()
            # float32 copies: torchvision rounds differences of half types, and those of uint8 wrap.
            wide = (b if dtype is torch.float64 else b.float() for b in (boxes1, boxes2))
            expected = theirs(*wide, *eps)
            assert result.dtype is expected.dtype
            known = expected.isfinite()  # NaN for boxes of no area
            torch.testing.assert_close(result[known], expected[known], atol=2e-6, rtol=1e-5)
            if dtype is not torch.uint8:
                expected = theirs(boxes1, boxes2, *eps)
                assert result.dtype is expected.dtype
                tolerance = 0.02 if dtype.itemsize == 2 else 2e-6
                torch.testing.assert_close(result[known], expected[known], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", [function.__name__ for function in ALL])
def test_inverted_boxes_like_torchvision(name):
    tv = pytest.importorskip("torchvision").ops
    function, theirs = globals()[name], getattr(tv, name)
    generator = torch.Generator().manual_seed(11)
    for _ in range(50):
        boxes1, boxes2 = (torch.randint(-4, 5, (6, 4), generator=generator).double() for _ in range(2))
        result, expected = function(boxes1, boxes2), theirs(boxes1, boxes2)
        known = expected.isfinite()
        torch.testing.assert_close(result[known], expected[known], atol=1e-9, rtol=1e-9)
        assert result.isfinite().all()


@pytest.mark.parametrize("name", [function.__name__ for function in ALL])
def test_derivatives_like_torchvision(name):
    tv = pytest.importorskip("torchvision").ops
    generator = torch.Generator().manual_seed(12)
    for _ in range(20):
        boxes1, boxes2 = (overlapping_boxes(generator, 5) for _ in range(2))
        gradients = []
        for function in (globals()[name], getattr(tv, name)):
            leaves = [b.clone().requires_grad_() for b in (boxes1, boxes2)]
            gradients.append(torch.autograd.grad(function(*leaves).square().sum(), leaves))
        torch.testing.assert_close(*gradients, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("fmt", ["xyxy", "xywh", "cxcywh"])
def test_formats_like_torchvision(fmt):
    tv = pytest.importorskip("torchvision").ops
    generator = torch.Generator().manual_seed(13)
    for n, m in ((0, 3), (3, 0), (1, 1), (20, 30), (40, 40)):
        for dtype in (torch.float32, torch.float64):
            both = [proper_boxes(generator, k, dtype) for k in (n, m)]
            both = [box_convert(b, "xyxy", fmt) for b in both]
            result, expected = box_iou(*both, fmt), tv.box_iou(*both, fmt=fmt)
            expected = torch.where(expected.isnan(), 0, expected)
            torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ALL)
def test_errors(function):
    good = torch.zeros(2, 4)
    with pytest.raises(TypeError, match=r"boxes1.*Tensor.*list"):
        function([[0, 0, 1, 1]], good)
    with pytest.raises(ValueError, match=r"boxes1.*4.*\[2, 5\]"):
        function(torch.zeros(2, 5), good)
    with pytest.raises(ValueError, match=r"boxes2.*4.*\[0\]"):
        function(good, torch.zeros(0))
    with pytest.raises(ValueError, match=r"boxes2.*\[\.\.\., M, 4\].*\[4\]"):
        function(good, good[0])


def test_format_error():
    with pytest.raises(ValueError, match=r"fmt.*xyxy.*cxcywhr.*'yxyx'"):
        box_iou(torch.zeros(2, 4), torch.zeros(2, 4), "yxyx")
