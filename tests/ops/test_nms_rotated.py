"""nms_rotated: by hand, against the specification and nms, edge cases, errors."""

import math

import pytest
import torch
from torch.library import opcheck

import fastcv
from fastcv import reference

nms_rotated = fastcv.ops.nms_rotated
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def random_rotated(n, seed=0, spread=100.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([spread, spread, 40.0, 12.0, 720.0])
    boxes = torch.rand((n, 5), generator=generator) * scale + torch.tensor([0, 0, 2.0, 2.0, -360])
    return boxes.to(dtype), torch.rand(n, generator=generator).to(dtype)


def expected(boxes, scores, iou_threshold, idxs=None):
    return reference.nms_rotated.nms_rotated(boxes.double(), scores, idxs, iou_threshold)


def test_by_hand():
    # A plank, nearly the same, across it (IoU 4 / 28), and elsewhere.
    boxes = torch.tensor([[0.0, 0, 8, 2, 0], [0, 0, 8, 2, 4], [0, 0, 8, 2, 90], [20, 0, 8, 2, 0]])
    scores = torch.tensor([0.7, 0.9, 0.8, 0.6])
    assert nms_rotated(boxes, scores, 0.5).tolist() == [1, 2, 3]
    assert nms_rotated(boxes, scores, 0.1).tolist() == [1, 3]
    assert nms_rotated(boxes, scores, 1.0).tolist() == [1, 2, 0, 3]
    assert nms_rotated(boxes, scores, 0.1, idxs=torch.tensor([0, 1, 0, 1])).tolist() == [1, 2, 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 300, 1100])
def test_reference(n, dtype):
    boxes, scores = random_rotated(n, spread=60 + n / 4, dtype=dtype)
    idxs = torch.arange(n) % 3 - 1
    for threshold in (0.0, 0.3, 0.7):
        kept = nms_rotated(boxes, scores, threshold)
        assert kept.dtype == torch.int64
        assert torch.equal(kept, expected(boxes, scores, threshold))
        assert torch.equal(nms_rotated(boxes, scores, threshold, idxs=idxs), expected(boxes, scores, threshold, idxs))
    if n > 1:
        assert nms_rotated(boxes, scores, -0.1).tolist() == [int(scores.double().argmax())]


def test_boxes_along_the_axes_are_those_of_nms():
    generator = torch.Generator().manual_seed(1)
    corners = torch.randint(0, 40, (400, 2), generator=generator).float()
    sizes = torch.randint(1, 16, (400, 2), generator=generator) * 2.0
    scores = torch.rand(400, generator=generator)
    upright = torch.cat([corners, corners + sizes], 1)
    turned = torch.cat([corners + sizes / 2, sizes, torch.zeros(400, 1)], 1)
    for threshold in (0.31, 0.57):
        assert torch.equal(nms_rotated(turned, scores, threshold), fastcv.ops.nms(upright, scores, threshold))
    # The same sets of points: sides exchanged, and a quarter turn.
    turned[::2, 2:4] = turned[::2, 2:4].flip(1)
    turned[::2, 4] += 90
    assert torch.equal(nms_rotated(turned, scores, 0.57), fastcv.ops.nms(upright, scores, 0.57))


def test_ties_go_to_the_lowest_index():
    boxes = torch.tensor([[5.0, 5, 4, 2, 30]]).repeat(600, 1)
    scores = torch.ones(600)
    assert nms_rotated(boxes, scores, 0.99).tolist() == [0]
    assert nms_rotated(boxes, scores, 1.0).tolist() == list(range(600))
    assert nms_rotated(boxes, scores, 0.5, idxs=torch.arange(600) // 300).tolist() == [0, 300]


def test_formats():
    boxes, scores = random_rotated(200)
    kept = nms_rotated(boxes.double(), scores, 0.3)
    for fmt in ("xywhr", "xyxyxyxy"):
        assert torch.equal(
            nms_rotated(fastcv.ops.box_convert(boxes.double(), "cxcywhr", fmt), scores, 0.3, fmt=fmt), kept
        )


def test_numbers_that_are_none():
    boxes, scores = random_rotated(60, spread=20)
    boxes[3, 0] = boxes[9, 4] = boxes[20, 2] = scores[5] = math.nan
    boxes[11, 4] = math.inf
    boxes[12, 2], boxes[13, 3], boxes[14, 2], boxes[15, 0] = 0, -3, math.inf, math.inf
    scores[30], scores[31] = math.inf, -math.inf
    for threshold in (0.0, 0.2):
        kept = nms_rotated(boxes, scores, threshold)
        assert torch.equal(kept, expected(boxes, scores, threshold))
        assert not {3, 9, 20, 5, 11} & set(kept.tolist()) and {12, 13, 14, 15, 30} <= set(kept.tolist())


def test_strided_and_differing_types():
    boxes, scores = random_rotated(150)
    strided = boxes.t().contiguous().t()
    assert torch.equal(nms_rotated(strided, scores.double(), 0.3), expected(boxes, scores, 0.3))
    idxs = torch.tensor([0.0, -0.0, 1.5]).repeat(50)
    assert torch.equal(
        nms_rotated(boxes, scores, 0.3, idxs=idxs),
        nms_rotated(boxes, scores, 0.3, idxs=torch.tensor([0, 0, 1], dtype=torch.uint8).repeat(50)),
    )


def test_operator_and_compile():
    boxes, scores = random_rotated(40)
    opcheck(torch.ops.fastcv.nms_rotated, (boxes.double(), scores, None, 0.3))
    compiled = torch.compile(lambda b, s: nms_rotated(b, s, 0.3), fullgraph=True, backend="eager")
    assert torch.equal(compiled(boxes, scores), nms_rotated(boxes, scores, 0.3))
    with pytest.raises(RuntimeError, match="vmap over nms_rotated"):
        torch.func.vmap(lambda b: nms_rotated(b, scores, 0.3))(boxes[None])


def test_errors():
    boxes, scores = random_rotated(4)
    for error, match, arguments, options in (
        (TypeError, "boxes", (None, scores, 0.5), {}),
        (TypeError, "scores", (boxes, scores.long(), 0.5), {}),
        (ValueError, r"boxes: expected shape \[N, 5\]", (boxes[:, :4], scores, 0.5), {}),
        (ValueError, r"boxes: expected shape \[N, 8\]", (boxes, scores, 0.5), {"fmt": "xyxyxyxy"}),
        (ValueError, "scores: expected shape", (boxes, scores[:3], 0.5), {}),
        (ValueError, "fmt", (boxes, scores, 0.5), {"fmt": "xyxy"}),
        (ValueError, "idxs", (boxes, scores, 0.5), {"idxs": torch.zeros(3)}),
        (TypeError, "iou_threshold", (boxes, scores, None), {}),
    ):
        with pytest.raises(error, match=match):
            nms_rotated(*arguments, **options)
    with pytest.raises(RuntimeError, match="float64"):
        torch.ops.fastcv.nms_rotated(boxes, scores, None, 0.5)
