import itertools

import pytest
import torch
from nms_cases import assert_all_equal, make, with_threads

import fastcv
from fastcv import reference
from fastcv.ops import batched_nms, nms, nms_padded

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAN = float("nan")


def images_of(kind, images, n, dtype=torch.float32):
    boxes, scores = zip(*(make(kind, n, seed, dtype) for seed in range(images)), strict=True)
    return torch.stack(boxes), torch.stack(scores)


# ---- by hand -------------------------------------------------------------------------------------


def test_by_hand():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [1, 1, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30]]])
    scores = torch.tensor([[0.5, 0.6, 0.7, 0.8]])
    padded = nms_padded(boxes, scores, 0.5, 3)
    assert padded.indices.tolist() == [[3, 2, -1]]
    assert padded.labels.tolist() == [[0, 0, -1]]
    idxs = torch.tensor([[1, 1, 2, 1]])
    padded = nms_padded(boxes, scores, 0.5, 4, idxs=idxs)
    assert padded.indices.tolist() == [[3, 2, 1, -1]]
    assert padded.labels.tolist() == [[1, 2, 1, -1]]
    assert padded.counts.tolist() == [3]
    assert nms_padded(boxes, scores, 0.5, 2, idxs=idxs).indices.tolist() == [[3, 2]]
    # Every box in both classes, the second class upside down.
    both = torch.stack([scores, 1 - scores], 1)
    padded = nms_padded(boxes, both, 0.5, 5, score_threshold=0.2)
    assert padded.indices.tolist() == [[3, 2, 0, -1, -1]]  # 1 - 0.8 = 0.2 is not above the threshold
    assert padded.labels.tolist() == [[0, 0, 1, -1, -1]]


# ---- against batched_nms and the reference -------------------------------------------------------


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_padded_is_batched_nms_of_each_image(dtype, images):
    boxes, scores = images_of("crowded", images, 300, dtype)
    idxs = torch.randint(-2, 3, (images, 300), generator=torch.Generator().manual_seed(0))
    for max_output, threshold in itertools.product((1, 20, 300, 400), (None, 0.5)):
        padded = nms_padded(boxes, scores, 0.4, max_output, idxs=idxs, score_threshold=threshold)
        for b in range(images):
            kept = batched_nms(boxes[b], scores[b], idxs[b], 0.4)
            if threshold is not None:
                kept = kept[scores[b][kept] > threshold]
            kept = kept[:max_output]
            k = len(kept)
            assert padded.counts[b] == k
            assert torch.equal(padded.indices[b, :k], kept)
            assert torch.equal(padded.labels[b, :k], idxs[b][kept])
            assert (padded.indices[b, k:] == -1).all()
            assert (padded.labels[b, k:] == -1).all()


@pytest.mark.parametrize("kind", ["crowded", "duplicates"])
@pytest.mark.parametrize("images, classes, n", [(2, 3, 100), (1, 30, 60), (5, 1, 50)])
def test_padded_with_all_classes_matches_the_reference(images, classes, n, kind):
    boxes, _ = images_of(kind, images, n)
    scores = torch.rand((images, classes, n), generator=torch.Generator().manual_seed(0))
    scores[:, 0] = (scores[:, 0] * 8).round() / 8
    scores[0, 0, 3], boxes[0, 5, 1] = NAN, NAN
    for max_output, threshold, iou_type in ((10, None, "iou"), (200, 0.9, "iou"), (60, 0.5, "diou")):
        padded = nms_padded(boxes, scores, 0.3, max_output, score_threshold=threshold, iou_type=iou_type)
        limit = float("-inf") if threshold is None else threshold
        expected = reference.nms.nms_padded(boxes, scores, None, 0.3, max_output, limit, iou_type == "diou")
        for have, want in zip(padded, expected, strict=True):
            assert torch.equal(have, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padded_takes_more_candidates_where_the_best_are_copies(dtype):
    # The best 30,000 of 32,000 boxes are copies of three, so that the first few thousand candidates give only three.
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand((1, 32000, 4), generator=generator, dtype=torch.float64)
    boxes[..., 2:] += boxes[..., :2] * 0.1 + 0.001
    boxes[0, :30000] = boxes[0, torch.arange(30000) % 3 + 31000]
    scores = torch.rand((1, 32000), generator=generator, dtype=torch.float64)
    scores[0, :30000] += 1
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    kept = nms(boxes[0], scores[0], 0.5)
    for limit in (2, 3, 50):
        padded = nms_padded(boxes, scores, 0.5, limit)
        assert padded.counts.item() == limit
        assert torch.equal(padded.indices[0], kept[:limit])
    # Equal scores cannot be told apart, so all are candidates at once.
    assert torch.equal(
        nms_padded(boxes, torch.ones_like(scores), 0.5, 9).indices[0], nms(boxes[0], scores[0] * 0, 0.5)[:9]
    )


def test_score_threshold_rounds_as_a_comparison_in_pytorch():
    boxes = torch.tensor([[[0.0, 0, 1, 1], [5, 5, 6, 6]]])
    scores = torch.tensor([[0.1, 0.2]])
    assert (scores > 0.1).tolist() == [[False, True]]  # although float32(0.1) > 0.1
    assert nms_padded(boxes, scores, 0.5, 2, score_threshold=0.1).counts.item() == 1
    # Without a threshold a score of -infinity is kept, with -infinity as threshold too.
    scores = torch.tensor([[float("-inf"), 0.2]])
    assert nms_padded(boxes, scores, 0.5, 2).counts.item() == 2
    assert nms_padded(boxes, scores, 0.5, 2, score_threshold=-1e300).counts.item() == 1


@pytest.mark.parametrize(
    "images, classes, n, limit", [(0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 0, 3), (2, 2, 5, 0), (0, 0, 0, 0)]
)
def test_empty_everything(images, classes, n, limit):
    boxes, scores = torch.rand(images, n, 4), torch.rand(images, classes, n)
    padded = nms_padded(boxes, scores, 0.5, limit)
    assert padded.indices.shape == padded.labels.shape == (images, limit)
    if 0 in (classes, n, limit):
        assert (padded.indices == -1).all() and (padded.labels == -1).all()
        assert torch.equal(padded.counts, torch.zeros(images, dtype=torch.int64))
    idxs = torch.zeros(images, n, dtype=torch.int64)
    assert nms_padded(boxes, torch.rand(images, n), 0.5, limit, idxs=idxs).counts.shape == (images,)


def test_results_do_not_depend_on_the_number_of_threads():
    boxes, scores = images_of("crowded", 3, 3000)
    idxs = torch.arange(3000).expand(3, -1) % 40
    many = torch.rand((3, 40, 3000), generator=torch.Generator().manual_seed(0))
    assert_all_equal(with_threads(lambda: nms_padded(boxes, many, 0.5, 100, score_threshold=0.3)))
    assert_all_equal(with_threads(lambda: nms_padded(boxes[:1], many[:1], 0.5, 1000)))
    assert_all_equal(with_threads(lambda: nms_padded(boxes, scores, 0.5, 100, idxs=idxs)))


# ---- PyTorch's machinery -------------------------------------------------------------------------


def test_opcheck():
    boxes, scores = make("crowded", 40)
    idxs = torch.arange(40) % 3
    padded = torch.ops.fastcv.nms_padded.default
    torch.library.opcheck(padded, (boxes[None], scores[None], None, 0.5, 7, 0.1))
    torch.library.opcheck(padded, (boxes[None], scores[None], idxs[None], 0.5, 7, 0.1, True))
    torch.library.opcheck(padded, (boxes.view(2, 20, 4), torch.rand(2, 3, 20), None, 0.5, 7, 0.1))
    assert fastcv.build_info()["operators"]["nms_padded"]["cpu"] == "compiled"


def test_compile():
    def detect(boxes, scores, idxs):
        padded = nms_padded(boxes, scores, 0.5, 5, idxs=idxs)
        return boxes.gather(1, padded.indices.clamp(min=0)[..., None].expand(-1, -1, 4)), *padded

    compiled = torch.compile(detect, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (30, 50):
        boxes, scores = images_of("crowded", 2, n)
        args = boxes, scores, torch.arange(n).expand(2, -1) % 3
        for have, want in zip(compiled(*args), detect(*args), strict=True):
            assert torch.equal(have, want)


def test_vmap():
    boxes, scores = images_of("crowded", 6, 50)
    boxes, scores = boxes.view(2, 3, 50, 4), scores.view(2, 3, 50)
    idxs = torch.arange(50).expand(3, 50) % 4
    expected = nms_padded(boxes.flatten(0, 1), scores.flatten(0, 1), 0.3, 9, idxs=idxs.repeat(2, 1))
    mapped = torch.vmap(lambda b, s, i: tuple(nms_padded(b, s, 0.3, 9, idxs=i)), (0, 0, None))(boxes, scores, idxs)
    for have, want in zip(mapped, expected, strict=True):
        assert torch.equal(have.flatten(0, 1), want)
    # Boxes shared, scores [C, N] mapped over their last dimension but one.
    many = torch.rand((3, 4, 2, 50), generator=torch.Generator().manual_seed(0))
    mapped = torch.vmap(lambda b, s: tuple(nms_padded(b, s, 0.3, 9)), (None, 2))(boxes[0], many)
    for i in range(2):
        for have, want in zip(mapped, nms_padded(boxes[0], many[:, :, i], 0.3, 9), strict=True):
            assert torch.equal(have[i], want)
    for limit, n in ((0, 5), (3, 0)):
        mapped = torch.vmap(lambda b, s, k=limit: tuple(nms_padded(b, s, 0.3, k)))(boxes[:, :0, :n], scores[:, :0, :n])
        assert mapped[0].shape == (2, 0, limit)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"boxes": torch.zeros(5, 4)}, ValueError, r"boxes: expected shape \[B, N, 4\], got \[5, 4\]"),
        ({"scores": torch.zeros(2, 4)}, ValueError, r"scores: expected shape \[2, 5\], got \[2, 4\]"),
        ({"scores": torch.zeros(2, 3, 4)}, ValueError, r"scores: expected shape \[2, C, 5\], got \[2, 3, 4\]"),
        ({"scores": torch.zeros(10)}, ValueError, r"scores: expected shape \[2, 5\], got \[10\]"),
        ({"max_output": -1}, ValueError, "max_output: expected an int of at least 0, got -1"),
        ({"max_output": 2.5}, ValueError, "max_output: expected an int of at least 0, got 2.5"),
        ({"idxs": torch.zeros(2, 5)}, TypeError, "idxs: expected an integer type, got torch.float32"),
        ({"idxs": torch.zeros(5, dtype=torch.int64)}, ValueError, r"idxs: expected shape \[2, 5\], got \[5\]"),
        ({"iou_threshold": "high"}, TypeError, "iou_threshold: expected a number, got 'high'"),
        ({"score_threshold": "low"}, TypeError, "score_threshold: expected a number, got 'low'"),
        ({"iou_type": None}, ValueError, 'iou_type: expected "iou" or "diou", got None'),
    ],
)
def test_errors(change, error, message):
    args = {"boxes": torch.zeros(2, 5, 4), "scores": torch.zeros(2, 5), "iou_threshold": 0.5, "max_output": 3}
    with pytest.raises(error, match=message):
        nms_padded(**(args | change))
    if "idxs" not in change and "scores" not in change and "boxes" not in change:
        idxs = torch.zeros(2, 5, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"idxs: expected None with scores of shape \[B, C, N\]"):
            nms_padded(args["boxes"], torch.zeros(2, 3, 5), 0.5, 3, idxs=idxs)


def test_the_kernel_checks_its_arguments_itself():
    boxes, scores, ids = torch.zeros(1, 5, 4), torch.zeros(1, 5), torch.zeros(1, 5, dtype=torch.int64)
    for args in (
        (boxes[0], scores[0], None, 0.5, 3, 0.0),
        (boxes, scores[:, :4], None, 0.5, 3, 0.0),
        (boxes, scores, ids[:, :4], 0.5, 3, 0.0),
        (boxes, torch.zeros(1, 2, 5), ids, 0.5, 3, 0.0),
        (boxes, scores, None, 0.5, -1, 0.0),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.fastcv.nms_padded(*args)
