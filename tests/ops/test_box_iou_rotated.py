import math

import pytest
import torch

from fastcv.ops.box_iou import box_iou
from fastcv.ops.boxes import box_convert
from fastcv.reference import box_iou_rotated as rotated_reference

FORMATS = ("cxcywhr", "xywhr", "xyxyxyxy")


def random_rotated(generator, n, spread=60.0, dtype=torch.float64):
    scale = torch.tensor([spread, spread, 30.0, 30.0, 720.0], dtype=torch.float64)
    boxes = torch.rand((n, 5), generator=generator, dtype=torch.float64) * scale
    return (boxes + torch.tensor([0, 0, 0.5, 0.5, -360], dtype=torch.float64)).to(dtype)


def clipped_area(polygon, clip):
    """Sutherland and Hodgman, "Reentrant polygon clipping", 1974, in plain floats."""
    for (px, py), (qx, qy) in zip(clip, clip[1:] + clip[:1], strict=True):

        def side(point, px=px, py=py, qx=qx, qy=qy):
            return (qx - px) * (point[1] - py) - (qy - py) * (point[0] - px)

        clipped = []
        for a, b in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            sa, sb = side(a), side(b)
            if sa >= 0:
                clipped.append(a)
            if sa * sb < 0:
                t = sa / (sa - sb)
                clipped.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])))
        polygon = clipped
        if not polygon:
            return 0.0
    pairs = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return sum(ax * by - bx * ay for (ax, ay), (bx, by) in pairs) / 2


def iou_by_clipping(box1, box2):
    corners = box_convert(torch.stack((box1, box2)).double(), "cxcywhr", "xyxyxyxy")
    a, b = ([tuple(p) for p in c.reshape(4, 2).tolist()] for c in corners)
    overlap = clipped_area(a, b)
    return overlap / ((box1[2] * box1[3] + box2[2] * box2[3]).item() - overlap)


# ---- by hand -------------------------------------------------------------------------------------


def test_by_hand():
    square = torch.tensor([[0.0, 0.0, 2.0, 2.0, 0.0]])
    # Turned by 45 degrees, the common part is a regular octagon of inradius 1.
    octagon = 8 * math.tan(math.pi / 8)
    turned = torch.tensor([[0.0, 0.0, 2.0, 2.0, 45.0]])
    assert box_iou(square, turned, "cxcywhr").item() == pytest.approx(octagon / (8 - octagon))
    # A plank across another: 2 x 2 shared of 4 x 2 and 2 x 4.
    plank = torch.tensor([[0.0, 0.0, 4.0, 2.0, 0.0], [0.0, 0.0, 4.0, 2.0, 90.0]])
    expected = torch.tensor([[1, 1 / 3], [1 / 3, 1]])
    for fmt in ("cxcywhr", "xywhr", "xyxyxyxy"):
        boxes = box_convert(plank, "cxcywhr", fmt)
        torch.testing.assert_close(box_iou(boxes, boxes, fmt), expected, atol=1e-6, rtol=0)
    # Neighbours that share an edge or a corner share no area.
    touching = torch.tensor([[2.0, 0.0, 2.0, 2.0, 0.0], [2.0, 2.0, 2.0, 2.0, 90.0]])
    assert box_iou(square, touching, "cxcywhr").abs().max() < 1e-12


def test_degenerate_boxes_by_hand():
    thin = torch.tensor([[0.0, 0.0, 0.0, 2.0, 10.0], [0.0, 0.0, -2.0, 2.0, 10.0]])
    assert box_iou(thin, thin, "cxcywhr").tolist() == [[0, 0], [0, 0]]
    thin = torch.tensor([[1.0, 1.0, w, h, 30.0] for w in (0, 2) for h in (0, 2)])
    thin.requires_grad_()
    box_iou(thin, thin.detach(), "cxcywhr").sum().backward()
    assert thin.grad.isfinite().all()


def test_nan_and_infinity():
    good = torch.tensor([[0.0, 0.0, 4.0, 2.0, 0.0]])
    for column in range(5):
        bad = good.clone()
        bad[0, column] = math.nan
        assert box_iou(bad, good, "cxcywhr").isnan().all(), column
        assert box_iou(good, bad, "cxcywhr").isnan().all(), column
    for column in (2, 3):
        bad = good.clone()
        bad[0, column] = math.inf
        both = torch.cat((bad, good, bad))
        assert box_iou(both, both, "cxcywhr").tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


# ---- properties ----------------------------------------------------------------------------------


def test_against_polygon_clipping():
    generator = torch.Generator().manual_seed(4)
    boxes1, boxes2 = random_rotated(generator, 30), random_rotated(generator, 30)
    boxes1[::5, 4] = boxes2[::5, 4] = 30  # parallel
    boxes1[::7, 2] = 1e-4  # thin
    boxes2[::6] = boxes1[::6]  # equal
    boxes2[1::6, :2], boxes2[1::6, 4] = boxes1[1::6, :2], boxes1[1::6, 4] + 90
    result = box_iou(boxes1, boxes2, "cxcywhr")
    expected = [[iou_by_clipping(a, b) for b in boxes2] for a in boxes1]
    assert (result > 0).sum() > 100
    torch.testing.assert_close(result, result.new_tensor(expected), atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_invariants(dtype):
    generator = torch.Generator().manual_seed(5)
    boxes = random_rotated(generator, 60, dtype=dtype)
    result = box_iou(boxes, boxes, "cxcywhr")
    assert result.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert result.min() >= 0 and result.max() <= 1
    assert (result.diag() == 1).all()
    torch.testing.assert_close(result, result.T, atol=1e-7, rtol=0)

    moved = boxes.double()
    angle = math.radians(77.0)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    moved[:, :2] = moved[:, :2] @ turn.double() + torch.tensor([1e4, -3e3])  # counter-clockwise
    moved[:, 4] += 77.0
    torch.testing.assert_close(box_iou(moved, moved, "cxcywhr").to(result.dtype), result, atol=1e-5, rtol=0)
    turned = boxes.double()
    turned[:, 2:4] = turned[:, 2:4].flip(-1)
    turned[:, 4] += 90  # the same set of points
    again = box_iou(turned, boxes.double(), "cxcywhr")
    assert again.min() >= 0 and again.max() <= 1  # in float64 too, where rounding shows
    torch.testing.assert_close(again.to(result.dtype), result, atol=1e-6, rtol=0)


def test_rounding_does_not_exceed_one():
    # Unclamped, the intersection of these equal boxes is an ulp larger than either.
    box = [52.97649325820711, 57.64078534717853, 2.4076889734160134, 12.656865130190289]
    boxes = torch.tensor([[*box, angle] for angle in (508.8338521205277, 688.8338521205277)], dtype=torch.float64)
    assert box_iou(boxes, boxes, "cxcywhr").max() <= 1


def test_equals_axis_aligned_at_right_angles():
    generator = torch.Generator().manual_seed(6)
    boxes = torch.randint(-9, 10, (30, 4), generator=generator).double()
    boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:].abs()
    centred = box_convert(boxes, "xyxy", "cxcywh")
    turned = torch.cat((centred, torch.full((30, 1), 180.0)), dim=1)
    expected = box_iou(boxes, boxes)
    torch.testing.assert_close(box_iou(turned, turned, "cxcywhr"), expected, atol=1e-12, rtol=0)


# Boxes for which published implementations gave values far off, negative or above 1.
PUBLISHED = [
    # detectron2 issue 2154 (0.600 for 1), 2167 (0.585 for 1), 1207 (0.266 for 0)
    (
        [296.6620178222656, 458.73883056640625, 23.515729904174805, 47.677001953125, 0.087951660],
        [296.66201, 458.73882, 23.51573, 47.67702, 0.087951],
        1.0,
    ),
    (
        [2563.74462890625, 1436.79016113, 2174.70336914, 214.0950012207, 115.118347167],
        [2563.74462890625, 1436.79028320, 2174.70288086, 214.0949554443, 115.118354797],
        1.0,
    ),
    ([160.0, 153.0, 230.0, 23.0, -37.0], [190.0, 127.0, 80.0, 21.0, -46.0], 0.0),
    # mmcv issue 2621 (0.333 for 1), 2952 (-12128368 and 6.05 for about 0); angles in radians there
    (
        [0.0, 0.0, 180.6422271729, 136.3633728027, math.degrees(0.9559648633)],
        [0.0, 0.0, 180.6422271729, 136.3633728027, math.degrees(0.9559648633)],
        1.0,
    ),
    (
        [135.07, 406.72, 7.9445e-7, 1.9711e3, math.degrees(1.7708)],
        [151.0080, 436.2173, 302.0159, 313.7347, math.degrees(3.1184)],
        0.0,
    ),
    (
        [135.07, 406.72, 7.9445e-7, 1.9711e10, math.degrees(1.7708)],
        [151.0080, 436.2173, 302.0159, 313.7347, math.degrees(3.1184)],
        0.0,
    ),
    # mmrotate issue 26 (371957 to inf for 0)
    (
        [903.34, 1034.4, 1.81e-7, 1e-7, math.degrees(-0.312)],
        [852.50, 702.50, 761.81, 382.00, math.degrees(-1.3984)],
        0.0,
    ),
    # rotated_maskrcnn issue 46 (0.333 for 1), RRPN issue 44 (1.35)
    (
        [672.4067, 290.7776, 791.0275, 38.9333, 34.1454],
        [672.4067, 290.7776, 791.0275, 38.9333, 34.1454],
        1.0,
    ),
    ([46.83, 44.03, 3.9, 1.63, 0.0], [46.83, 44.03, 1.63, 3.9, math.degrees(1.45)], 0.854834),
    # Rotated_IoU issue 8 (0.333 for 0), 38 (0 for 1), 39 (1 for 0.6)
    ([0.0, 0.0, 2.0, 2.0, 0.0], [0.0, 2.0, 2.0, 2.0, 0.0], 0.0),
    ([0.0, 0.0, 2.0, 2.0, 45.0], [0.0, 0.0, 2.0, 2.0, 45.0], 1.0),
    ([4.0, 5.0, 8.0, 10.0, 0.0], [3.0, 4.0, 6.0, 8.0, 0.0], 0.6),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("box1", "box2", "expected"), PUBLISHED)
def test_published_failures(box1, box2, expected, dtype):
    box1, box2 = torch.tensor([box1], dtype=dtype), torch.tensor([box2], dtype=dtype)
    for a, b in ((box1, box2), (box2, box1)):
        iou = box_iou(a, b, "cxcywhr").item()
        assert 0 <= iou <= 1 and iou == pytest.approx(expected, abs=1e-5)


def test_derivatives():
    generator = torch.Generator().manual_seed(7)
    boxes1, boxes2 = random_rotated(generator, 4, 20.0), random_rotated(generator, 5, 20.0)
    inputs = (boxes1.requires_grad_(), boxes2.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: box_iou(a, b, "cxcywhr"), inputs)
    # Vertical and horizontal edges, where the closed form would divide by zero.
    straight = torch.tensor([[0.0, 0.0, 4.0, 3.0, 0.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, 0.5, 2.5, 5.0, 0.0], [1.0, 0.5, 9.0, 1.0, 90.0]]).double()
    inputs = (straight.requires_grad_(), other.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: box_iou(a, b, "cxcywhr"), inputs)


def test_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(8)
    boxes1, boxes2 = random_rotated(generator, 23), random_rotated(generator, 11)
    expected = rotated_reference.box_iou_rotated(boxes1, boxes2, torch.float64)
    counts = []
    rows = rotated_reference._iou_of_rows
    monkeypatch.setattr(rotated_reference, "_iou_of_rows", lambda a, b: counts.append(len(a)) or rows(a, b))
    for pairs, chunks in ((1, [1] * 23), (22, [2] * 11 + [1]), (10**9, [23])):
        counts.clear()
        monkeypatch.setattr(rotated_reference, "_PAIRS_CPU", pairs)
        assert torch.equal(rotated_reference.box_iou_rotated(boxes1, boxes2, torch.float64), expected)
        assert counts == chunks


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("fmt", FORMATS)
def test_empty(fmt, n, m):
    columns = 8 if fmt == "xyxyxyxy" else 5
    boxes1 = torch.zeros(n, columns, requires_grad=True)
    result = box_iou(boxes1, torch.zeros(m, columns), fmt)
    assert result.shape == (n, m) and result.dtype is torch.float32
    result.sum().backward()
    assert boxes1.grad.shape == (n, columns)


def test_compiles_and_exports():
    fmt = "xyxyxyxy"  # the longest way: through both other formats

    class Model(torch.nn.Module):
        def forward(self, boxes):
            return box_iou(boxes, boxes, fmt)

    boxes = random_rotated(torch.Generator().manual_seed(9), 6, dtype=torch.float32)
    boxes = box_convert(boxes, "cxcywhr", fmt)
    expected = Model()(boxes)
    compiled = torch.compile(Model(), backend="eager", fullgraph=True)
    rows = torch.export.Dim("rows")
    exported = torch.export.export(Model(), (boxes[:3],), dynamic_shapes=({0: rows},)).module()
    for model in (compiled, exported):
        torch.testing.assert_close(model(boxes), expected, atol=1e-6, rtol=0)


# ---- against torchvision -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fmt", FORMATS)
def test_like_torchvision(fmt, dtype):
    tv = pytest.importorskip("torchvision").ops
    generator = torch.Generator().manual_seed(13)
    for n, m in ((0, 3), (3, 0), (1, 1), (20, 30), (40, 40)):
        both = [random_rotated(generator, k, dtype=dtype) for k in (n, m)]
        both = [box_convert(b, "cxcywhr", fmt) for b in both]
        result, expected = box_iou(*both, fmt), tv.box_iou(*both, fmt=fmt)
        # torchvision gives float32, and errs by this much against exact clipping.
        torch.testing.assert_close(result, expected.to(dtype), atol=5e-3, rtol=0)


# ---- errors --------------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(ValueError, match=r"boxes1.*5.*\[2, 4\]"):
        box_iou(torch.zeros(2, 4), torch.zeros(2, 5), "cxcywhr")
    with pytest.raises(ValueError, match=r"boxes2.*\[M, 8\].*\[1, 2, 8\]"):
        box_iou(torch.zeros(2, 8), torch.zeros(1, 2, 8), "xyxyxyxy")
    with pytest.raises(TypeError, match=r"boxes2.*Tensor.*NoneType"):
        box_iou(torch.zeros(2, 5), None, "xywhr")


def test_kernel_and_specification_are_one():
    """What needs derivatives takes the specification."""
    generator = torch.Generator().manual_seed(9)
    boxes1, boxes2 = random_rotated(generator, 37), random_rotated(generator, 70)
    boxes1[3, 0] = math.nan
    boxes2[5, 2], boxes2[6, 3] = math.inf, 0
    boxes1[1] = boxes2[1]
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-7), (torch.float16, 1e-7)):
        a, b = boxes1.to(dtype), boxes2.to(dtype)
        kernel = box_iou(a, b, "cxcywhr")
        specification = box_iou(a.clone().requires_grad_(), b, "cxcywhr")
        assert kernel.dtype == specification.dtype and specification.requires_grad and not kernel.requires_grad
        torch.testing.assert_close(kernel, specification.detach(), atol=atol, rtol=0, equal_nan=True)
    assert box_iou(boxes1[:0], boxes2, "cxcywhr").shape == (0, 70)
    assert box_iou(boxes1, boxes2[:0], "cxcywhr").shape == (37, 0)
    # Boxes that do not meet overlap nothing at all.
    apart = torch.tensor([[0.0, 0, 8, 2, 30]], dtype=torch.float64)
    for angle in range(0, 180, 7):
        other = torch.tensor([[7.0, -5, 6, 3, float(angle)]], dtype=torch.float64)
        if not iou_by_clipping(apart[0], other[0]) > 1e-12:
            assert box_iou(apart, other, "cxcywhr").item() == box_iou(other, apart, "cxcywhr").item() == 0
