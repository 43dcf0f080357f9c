import itertools
import math

import pytest
import torch
from nms_cases import KINDS, assert_all_equal, make, spoil, with_threads

import fastcv
from fastcv import reference
from fastcv.ops import batched_nms, nms, soft_nms

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
METHODS = ("linear", "gaussian", "naive")


# ---- by hand -------------------------------------------------------------------------------------


def test_by_hand():
    #    0    5    10   15        a = [0, 0, 10, 10] score 0.9,  b = [5, 0, 15, 10] score 0.8,
    #  0 aaaaaaaaaa               c = [0, 0, 10, 5] score 0.7,   d = [20, 0, 30, 10] score 0.6
    #    aaaaabbbbbbbbbb          IoU(a, b) = 50 / 150, IoU(a, c) = 50 / 100, IoU(b, c) = 25 / 125
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [0, 0, 10, 5], [20, 0, 30, 10]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    # a is first; b falls to 0.8 * 2 / 3 = 0.533, c to 0.35. d is second, then b; c overlaps b by 0.2 only.
    indices, lowered = soft_nms(boxes, scores)
    assert indices.tolist() == [0, 3, 1, 2]
    torch.testing.assert_close(lowered, torch.tensor([0.9, 0.6, 0.8 * 2 / 3, 0.35]))
    # With a lower threshold b lowers c once more.
    indices, lowered = soft_nms(boxes, scores, 0.1)
    assert indices.tolist() == [0, 3, 1, 2]
    torch.testing.assert_close(lowered, torch.tensor([0.9, 0.6, 0.8 * 2 / 3, 0.35 * 0.8]))
    indices, lowered = soft_nms(boxes, scores, 0.1, score_threshold=0.35)
    assert indices.tolist() == [0, 3, 1]
    indices, lowered = soft_nms(boxes, scores, sigma=0.5, method="gaussian")
    b, c = 0.8 * math.exp(-(1 / 9) / 0.5), 0.7 * math.exp(-0.25 / 0.5)
    assert indices.tolist() == [0, 1, 3, 2]
    torch.testing.assert_close(lowered, torch.tensor([0.9, b, 0.6, c * math.exp(-0.04 / 0.5)]))
    indices, lowered = soft_nms(boxes, scores, 0.4, method="naive")
    assert indices.tolist() == [0, 1, 3]
    assert torch.equal(lowered, scores[indices])
    # In classes of their own a and b do not see each other, and c only b.
    indices, lowered = soft_nms(boxes, scores, 0.1, idxs=torch.tensor([7, -7, -7, 7]))
    assert indices.tolist() == [0, 1, 3, 2]
    torch.testing.assert_close(lowered, torch.tensor([0.9, 0.8, 0.6, 0.7 * 0.8]))


def test_ties_go_to_the_lowest_index():
    boxes = torch.tensor([[50.0, 0, 60, 10], [0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 5], [50, 0, 60, 10]])
    indices, lowered = soft_nms(boxes, torch.tensor([0.8, 0.8, 0.8, 1.0, 0.8]), score_threshold=0)
    # 3 is first and halves 1 and 2; 0 is second and ends 4; of 1 and 2 the first ends the other.
    assert indices.tolist() == [3, 0, 1]
    torch.testing.assert_close(lowered, torch.tensor([1.0, 0.8, 0.4]))
    # Far apart in memory order and on the plane alike: 300 equal boxes in a row, more than a block of the kernel.
    start = torch.randperm(300, generator=torch.Generator().manual_seed(0)) * 20.0
    boxes = torch.stack([start, start * 0, start + 10, start * 0 + 10], 1)
    assert soft_nms(boxes, torch.ones(300))[0].tolist() == list(range(300))


# ---- against the reference -----------------------------------------------------------------------


def assert_same(boxes, scores, idxs, threshold, sigma, score_threshold, method, rtol):
    indices, lowered = soft_nms(boxes, scores, threshold, sigma, score_threshold, method=method, idxs=idxs)
    want, want_scores = reference.soft_nms.soft_nms(boxes, scores, idxs, threshold, sigma, score_threshold, method)
    assert indices.tolist() == want.tolist()
    torch.testing.assert_close(lowered, want_scores, rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_reference_in_float64(kind, method):
    for n, threshold, classes in itertools.product((0, 1, 2, 40, 150), (0.3, 0.0, -0.5, 1.5), (None, 1, 4)):
        if n == 150 and (threshold != 0.3 or classes == 1):
            continue
        boxes, scores = make(kind, n, seed=n, dtype=torch.float64)
        idxs = None if classes is None else torch.arange(n) % classes - 2
        if n > 20:
            boxes, scores = spoil(boxes, scores)
        assert_same(boxes, scores, idxs, threshold, 0.3, 0.05, method, rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_matches_the_reference_in_other_types(dtype, method):
    # Half types are computed in float32 and rounded at the end.
    boxes, scores = make("duplicates", 60)
    scores = torch.arange(1, 61)[torch.randperm(60, generator=torch.Generator().manual_seed(0))] / 61
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    indices, lowered = soft_nms(boxes, scores, 0.3, method=method)
    assert lowered.dtype == dtype
    wide = soft_nms(boxes.float(), scores.float(), 0.3, method=method)
    if dtype != torch.float64:
        assert torch.equal(indices, wide[0])
        assert torch.equal(lowered, wide[1].to(dtype))
    want = reference.soft_nms.soft_nms(boxes, scores, None, 0.3, 0.5, 0.001, method)
    torch.testing.assert_close(lowered, want[1], rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_many_boxes_over_many_blocks(method):
    # Boxes that die in heaps, so that the kernel compacts its blocks.
    for kind, n in (("mixed", 300), ("crowded", 700), ("duplicates", 500)):
        boxes, scores = make(kind, n, dtype=torch.float64)
        boxes[::2] = boxes[1::2] + 0.01
        assert_same(boxes, scores, None, 0.2, 0.05, 0.01, method, rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_ties_among_overlapping_boxes_of_many_blocks(method):
    # Which of two overlapping boxes of equal score is chosen first shows in all that follows.
    boxes, scores = make("crowded", 500, dtype=torch.float64)
    assert_same(boxes, (scores * 10).ceil() / 10, None, 0.3, 0.1, 0.05, method, rtol=1e-12)
    assert_same(boxes, torch.ones(500), torch.arange(500) % 2, 0.3, 0.1, 0.05, method, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_naive_is_nms(dtype, kind):
    for n, threshold in itertools.product((3, 900), (0.0, 0.3, 0.7, -0.1)):
        boxes, scores = make(kind, n, dtype=dtype)
        scores += 0.01
        kept, lowered = soft_nms(boxes, scores, threshold, score_threshold=0.0, method="naive")
        assert torch.equal(kept, nms(boxes, scores, threshold))
        assert torch.equal(lowered, scores[kept])
        idxs = torch.arange(n) % 5
        kept, _ = soft_nms(boxes, scores, threshold, score_threshold=0.0, method="naive", idxs=idxs)
        assert torch.equal(kept, batched_nms(boxes, scores, idxs, threshold))


def test_a_class_of_thousands():
    # More than fit into the shared memory of a GPU, until most of them are gone.
    boxes, scores = make("crowded", 5000)
    assert torch.equal(soft_nms(boxes, scores, 0.1, method="naive")[0], nms(boxes, scores, 0.1))
    boxes, scores = make("crowded", 3000, dtype=torch.float64)
    assert_same(boxes, scores, None, 0.1, 0.02, 0.2, "gaussian", rtol=1e-12)
    assert_same(boxes, scores, torch.arange(3000) // 2800, 0.1, 0.02, 0.2, "linear", rtol=1e-12)


def test_properties_of_the_scores():
    boxes, scores = make("crowded", 2000)
    for method in METHODS:
        indices, lowered = soft_nms(boxes, scores, 0.1, method=method)
        assert (lowered.diff() <= 0).all()  # greedy: each is the best of what is left
        assert (lowered <= scores[indices]).all()
        assert (lowered > 0.001).all()
        assert len(set(indices.tolist())) == len(indices)
        assert torch.equal(lowered[0], scores.max())


@pytest.mark.parametrize("method", METHODS)
def test_bad_values_disturb_nobody(method):
    boxes, scores = spoil(*make("crowded", 300))
    boxes[5] += 5000  # whose score is infinite
    indices, lowered = soft_nms(boxes, scores, 0.1, method=method)
    assert not {0, 1, 2, 3, 4, 6, 14, 15} & set(indices.tolist())  # NaN, and scores not above the threshold
    assert indices[0] == 5  # infinity is the best score
    for i in range(7, 14):  # infinite, inverted and flat boxes overlap nothing
        assert lowered[indices == i] == scores[i]
    # And they lower no other: without all these rows the rest comes out the same.
    rest, rest_scores = soft_nms(boxes[16:], scores[16:], 0.1, method=method)
    mine = indices >= 16
    assert torch.equal(indices[mine], rest + 16)
    assert torch.equal(lowered[mine], rest_scores)


def test_threshold_rounds_as_a_comparison_in_pytorch():
    boxes = torch.tensor([[0.0, 0, 1, 1], [5, 5, 6, 6]])
    assert soft_nms(boxes, torch.tensor([0.1, 0.2]), score_threshold=0.1)[0].tolist() == [1]
    assert soft_nms(boxes, torch.tensor([0.0, -0.0]), score_threshold=0)[0].tolist() == []


def test_any_strides_and_ids():
    boxes, scores = make("crowded", 200)
    idxs = torch.tensor([-(2**63), 2**31, 2**63 - 1])[torch.arange(200) % 3]
    expected = soft_nms(boxes, scores, idxs=idxs)
    for b, s, i in (
        (boxes.t().contiguous().t(), scores.repeat_interleave(3)[::3], idxs.repeat_interleave(2)[::2]),
        (boxes, scores, torch.tensor([0.5, -0.25, 1e30])[torch.arange(200) % 3]),
        (boxes, scores, (torch.arange(200) % 3).to(torch.uint8)),
    ):
        for have, want in zip(soft_nms(b, s, idxs=i), expected, strict=True):
            assert torch.equal(have, want)


def test_results_do_not_depend_on_the_number_of_threads():
    boxes, scores = make("crowded", 4000)
    idxs = torch.arange(4000) % 9
    assert_all_equal(with_threads(lambda: [t for m in METHODS for t in soft_nms(boxes, scores, method=m, idxs=idxs)]))


# ---- PyTorch's machinery -------------------------------------------------------------------------


def test_not_differentiable():
    boxes, scores = make("crowded", 10)
    _, lowered = soft_nms(boxes.requires_grad_(), scores.requires_grad_())
    assert not lowered.requires_grad


def test_opcheck():
    boxes, scores = make("crowded", 30)
    for inputs in (
        (boxes, scores, None),
        (boxes.half(), scores.double(), torch.arange(30) % 3),
        (boxes[:0], scores[:0], None),
    ):
        torch.library.opcheck(torch.ops.fastcv.soft_nms.default, (*inputs, 0.3, 0.5, 0.001, "linear"))
    assert fastcv.build_info()["operators"]["soft_nms"]["cpu"] == "compiled"


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compile():
    def detect(boxes, scores, idxs):
        indices, lowered = soft_nms(boxes, scores, method="gaussian", idxs=idxs)
        return boxes[indices], lowered * 2

    compiled = torch.compile(detect, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (30, 50):
        boxes, scores = make("crowded", n)
        for have, want in zip(
            compiled(boxes, scores, torch.arange(n) % 2), detect(boxes, scores, torch.arange(n) % 2), strict=True
        ):
            assert torch.equal(have, want)


def test_vmap_says_what_to_do():
    with pytest.raises(RuntimeError, match="loop over the images"):
        torch.vmap(lambda b, s: soft_nms(b, s))(torch.rand(2, 5, 4), torch.rand(2, 5))


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"boxes": torch.zeros(5, 3)}, ValueError, r"boxes: expected shape \[N, 4\], got \[5, 3\]"),
        ({"boxes": torch.zeros(5, 4, dtype=torch.int32)}, TypeError, "boxes: expected float32.*got torch.int32"),
        ({"scores": torch.zeros(6)}, ValueError, r"scores: expected shape \[5\], got \[6\]"),
        ({"idxs": torch.zeros(6)}, ValueError, r"idxs: expected shape \[5\], got \[6\]"),
        ({"iou_threshold": "a"}, TypeError, "iou_threshold: expected a number, got 'a'"),
        ({"sigma": None}, TypeError, "sigma: expected a number, got None"),
        ({"sigma": 0.0}, ValueError, "sigma: expected a number greater than 0, got 0.0"),
        ({"sigma": float("nan")}, ValueError, "sigma: expected a number greater than 0, got nan"),
        ({"score_threshold": -0.1}, ValueError, "score_threshold: expected at least 0, got -0.1"),
        ({"method": "hard"}, ValueError, 'method: expected "linear" or "gaussian" or "naive", got \'hard\''),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        soft_nms(**({"boxes": torch.zeros(5, 4), "scores": torch.zeros(5)} | change))


def test_the_kernel_checks_its_arguments_itself():
    boxes, scores, ids = torch.zeros(5, 4), torch.zeros(5), torch.zeros(5, dtype=torch.int64)
    for args in (
        (boxes[:, :3], scores, None, 0.3, 0.5, 0.0, "linear"),
        (boxes, scores[:4], None, 0.3, 0.5, 0.0, "linear"),
        (boxes, scores, ids[:4], 0.3, 0.5, 0.0, "linear"),
        (boxes, scores, None, 0.3, 0.5, -1.0, "linear"),
        (boxes, scores, None, 0.3, 0.0, 0.0, "linear"),
        (boxes, scores, None, 0.3, 0.5, 0.0, "cubic"),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.fastcv.soft_nms(*args)
