"""match_boxes: by hand, against the specification and torchvision's Matcher, edge cases, errors."""

import pytest
import torch
from torch.library import opcheck

import fastcv
from fastcv import reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def random_boxes(n, seed, size=60.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * 100
    return torch.cat([corner, corner + torch.rand(n, 2, generator=generator) * size], 1).to(dtype)


def expected(truth, boxes, *options):
    """The specification in the type of the kernels, whose roundings it shares."""
    dtype = torch.float64 if torch.float64 in (truth.dtype, boxes.dtype) else torch.float32
    return reference.match_boxes.match_boxes(truth.to(dtype), boxes.to(dtype), *options)


def test_by_hand():
    truth = torch.tensor([[0.0, 0, 4, 4], [2, 2, 6, 6]])
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 2, 6, 5], [1, 1, 5, 5], [4, 4, 6, 6], [9, 9, 12, 12]])
    # IoUs: 1 and 1/7; 2/13 and 3/4; 9/23 twice; 0 and 1/4; none
    assert fastcv.ops.match_boxes(truth, boxes, 0.7, 0.3).tolist() == [0, 1, -2, -1, -1]
    assert fastcv.ops.match_boxes(truth, boxes, 0.3, 0.3).tolist() == [0, 1, 0, -1, -1]
    assert fastcv.ops.match_boxes(truth, boxes, 0.9, 0.8, True).tolist() == [0, 1, -1, -1, -1]


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("truths, count", [(1, 1), (1, 700), (7, 257), (300, 20), (20, 9001), (3, 0)])
def test_reference(truths, count, dtype, low_quality):
    truth, boxes = random_boxes(truths, 0, dtype=dtype), random_boxes(count, 1, dtype=dtype)
    for high, low in ((0.7, 0.3), (0.5, 0.5), (0.05, 0.0)):
        matches = fastcv.ops.match_boxes(truth, boxes, high, low, low_quality)
        assert matches.dtype == torch.int64
        assert torch.equal(matches, expected(truth, boxes, high, low, low_quality))


@pytest.mark.parametrize("low_quality", [False, True])
def test_ties(low_quality):
    """Whole numbers, so that equal IoUs are many."""
    truth, boxes = random_boxes(12, 2).round() // 10, random_boxes(3000, 3).round() // 10
    matches = fastcv.ops.match_boxes(truth, boxes, 0.6, 0.4, low_quality)
    assert torch.equal(matches, expected(truth, boxes, 0.6, 0.4, low_quality))


def test_types_of_their_own():
    truth, boxes = random_boxes(5, 0, dtype=torch.float64), random_boxes(50, 1, dtype=torch.float16)
    assert torch.equal(fastcv.ops.match_boxes(truth, boxes, 0.5, 0.4), expected(truth, boxes, 0.5, 0.4, False))


def test_strided_tensors():
    truth, boxes = random_boxes(5, 0), random_boxes(50, 1)
    strided = boxes.t().contiguous().t(), torch.cat([boxes, boxes], 1)[:, 4:]
    for view in strided:
        assert torch.equal(
            fastcv.ops.match_boxes(truth, view, 0.5, 0.4), fastcv.ops.match_boxes(truth, boxes, 0.5, 0.4)
        )


def test_unusual_boxes():
    nan, inf = float("nan"), float("inf")
    unusual = [
        [0, 0, 0, 0],
        [5, 5, 5, 9],
        [8, 8, 2, 2],
        [nan, 0, 9, 9],
        [0, 0, 9, nan],
        [-inf, 0, inf, 9],
        [0, 0, 9, 9],
    ]
    unusual = torch.tensor(unusual, dtype=torch.float32)
    matches = fastcv.ops.match_boxes(unusual, unusual, 0.5, 0.1)
    assert matches.tolist() == [-1] * 6 + [6]


def test_no_ground_truth():
    for low, high in ((0.3, 0.7), (0.0, 0.0)):
        assert fastcv.ops.match_boxes(torch.empty(0, 4), random_boxes(3, 0), high, low, True).tolist() == [-1] * 3


@pytest.mark.parametrize("low_quality", [False, True])
def test_torchvision(low_quality):
    utils = pytest.importorskip("torchvision.models.detection._utils")
    from torchvision.ops import box_iou

    truth, boxes = random_boxes(15, 4), random_boxes(5000, 5)
    for high, low in ((0.7, 0.3), (0.5, 0.5)):
        theirs = utils.Matcher(high, low, low_quality)(box_iou(truth, boxes))
        assert torch.equal(fastcv.ops.match_boxes(truth, boxes, high, low, low_quality), theirs)


def test_opcheck():
    opcheck(torch.ops.fastcv.match_boxes, (random_boxes(3, 0), random_boxes(9, 1), 0.7, 0.3, True))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(gt_boxes=torch.zeros(2, 4, dtype=torch.int64)), TypeError, "gt_boxes: expected float32"),
        (dict(boxes=torch.zeros(2, 5)), ValueError, r"boxes: expected shape \[N, 4\]"),
        (dict(boxes=torch.zeros(2, 4, device="meta")), ValueError, "gt_boxes: expected the device of boxes"),
        (dict(low_threshold=0.8), ValueError, "low_threshold: expected 0 to high_threshold, 0.7, got 0.8"),
        (dict(low_threshold=-0.1), ValueError, "low_threshold: expected 0 to"),
        (dict(high_threshold=float("nan")), ValueError, "high_threshold|low_threshold"),
        (dict(high_threshold="0.7"), TypeError, "high_threshold: expected a number"),
    ],
)
def test_errors(change, error, message):
    arguments = dict(gt_boxes=torch.zeros(2, 4), boxes=torch.zeros(3, 4), high_threshold=0.7, low_threshold=0.3)
    with pytest.raises(error, match=message):
        fastcv.ops.match_boxes(**{**arguments, **change})
