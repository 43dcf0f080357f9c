import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from nms_cases import KINDS, assert_all_equal, greedy, iou_matrix, make, ranked, spoil, with_threads

import fastcv
from fastcv import reference
from fastcv.ops import batched_nms, nms, nms_padded

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
THRESHOLDS = (0.0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.95, 1.0, -0.1, 1.5)
NAN = float("nan")


# ---- by hand -------------------------------------------------------------------------------------


def test_nms_by_hand():
    #    0    5    10   15        a = [0, 0, 10, 10] score 0.9,  b = [5, 0, 15, 10] score 0.8,
    #  0 aaaaaaaaaa               c = [0, 0, 10, 5] score 0.7,   d = [20, 0, 30, 10] score 0.6
    #    aaaaabbbbbbbbbb          IoU(a, b) = 50 / 150, IoU(a, c) = 50 / 100, IoU(b, c) = 25 / 125
    boxes = torch.tensor([[20.0, 0, 30, 10], [0, 0, 10, 5], [5, 0, 15, 10], [0, 0, 10, 10]])
    scores = torch.tensor([0.6, 0.7, 0.8, 0.9])
    d, c, b, a = 0, 1, 2, 3
    assert nms(boxes, scores, 0.5).tolist() == [a, b, c, d]  # suppressed only where greater than 0.5
    assert nms(boxes, scores, 0.49).tolist() == [a, b, d]
    assert nms(boxes, scores, 0.3).tolist() == [a, d]
    assert nms(boxes, scores, 0.0).tolist() == [a, d]
    assert nms(boxes, scores, -0.1).tolist() == [a]
    # b goes first: c is then suppressed by nothing but b.
    scores[a] = 0.1
    assert nms(boxes, scores, 0.3).tolist() == [b, c, d]
    assert nms(boxes, scores, 0.1).tolist() == [b, d]


def test_diou_by_hand():
    # IoU 1 / 3; centres 5 apart, diagonal of the hull sqrt(15^2 + 10^2): DIoU = 1 / 3 - 25 / 325 = 0.2564.
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10]])
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.3).tolist() == [0]
    assert nms(boxes, scores, 0.3, iou_type="diou").tolist() == [0, 1]
    assert nms(boxes, scores, 0.25, iou_type="diou").tolist() == [0]


def test_batched_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30]])
    scores = torch.tensor([0.5, 0.6, 0.7, 0.8])
    assert batched_nms(boxes, scores, torch.tensor([1, 1, 2, 1]), 0.5).tolist() == [3, 2, 1]


def test_ties_go_to_the_lowest_index():
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(6, 1) + torch.tensor([0, 0, 50, 50, 50, 0])[:, None]
    scores = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.9, 0.5])
    assert nms(boxes, scores, 0.5).tolist() == [4, 0]
    assert nms(boxes, torch.zeros(6), 0.5).tolist() == [0, 2]
    assert nms(boxes, torch.tensor([0.0, -0.0, 0, 0, 0, 0]), 2.0).tolist() == [0, 1, 2, 3, 4, 5]


# ---- against the oracle, the reference and torchvision -------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_nms_matches_the_oracle(kind, dtype):
    # 512 kept boxes and more: the spatial index is in use.
    for n, tied in ((1100, False), (700, True)):
        boxes, scores = make(kind, n, seed=n, dtype=dtype)
        if tied:
            scores = (scores * 20).round()
        iou, order = iou_matrix(boxes.numpy()), ranked(boxes.numpy(), scores.numpy())
        for threshold in THRESHOLDS:
            assert nms(boxes, scores, threshold).tolist() == greedy(iou, order, threshold), threshold


@pytest.mark.parametrize("kind", ["mixed", "crowded", "scales", "long", "far"])
def test_nms_of_3000_boxes_matches_the_oracle(kind):
    boxes, scores = make(kind, 3000)
    iou, order = iou_matrix(boxes.numpy()), ranked(boxes.numpy(), scores.numpy())
    for threshold in (0.1, 0.3, 0.5, 0.7):
        assert nms(boxes, scores, threshold).tolist() == greedy(iou, order, threshold), threshold


@pytest.mark.parametrize("kind", KINDS)
def test_nms_matches_torchvision(kind):
    torchvision = pytest.importorskip("torchvision")
    sizes = ((0, torch.float32), (1, torch.float64), (2, torch.float32), (3000, torch.float32), (800, torch.float64))
    for (n, dtype), threshold in itertools.product(sizes, THRESHOLDS):
        boxes, scores = make(kind, n, seed=5, dtype=dtype)
        assert torch.equal(nms(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold)), (n, threshold)


def test_thousands_of_small_cases_match_torchvision():
    torchvision = pytest.importorskip("torchvision")
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 40, (4000,), generator=generator).tolist()
    thresholds = torch.rand(4000, generator=generator).tolist()
    for case, (n, threshold) in enumerate(zip(sizes, thresholds, strict=True)):
        boxes = torch.rand((n, 4), generator=generator) * 10
        boxes[:, 2:] += boxes[:, :2] * (case % 3 > 0)  # a third has inverted boxes
        scores = torch.rand(n, generator=generator)
        if case % 2:  # coordinates and scores that often repeat
            boxes, scores = boxes.floor(), (scores * 5).floor()
        assert torch.equal(nms(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold)), case


@pytest.mark.parametrize("iou_type", ["iou", "diou"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nms_matches_the_reference(dtype, iou_type):
    for kind, threshold in itertools.product(("crowded", "long", "duplicates", "grid"), (0.0, 0.3, 0.7, -0.3)):
        for n in (0, 1, 17, 64):
            boxes, scores = make(kind, n, seed=n, dtype=dtype)
            expected = reference.nms.nms(boxes, scores, threshold, iou_type == "diou")
            assert nms(boxes, scores, threshold, iou_type=iou_type).tolist() == expected.tolist()


@pytest.mark.parametrize("threshold", [0.1, 0.5])
@pytest.mark.parametrize("kind", ["mixed", "far", "subnormal"])
def test_diou_with_the_index_matches_the_reference(kind, threshold):
    boxes, scores = make(kind, 800)
    expected = reference.nms.nms(boxes, scores, threshold, True)
    assert torch.equal(nms(boxes, scores, threshold, iou_type="diou"), expected)


@pytest.mark.parametrize("n", [20, 900])
@pytest.mark.parametrize("dtype", FLOATS)
def test_bad_values_disturb_nobody(dtype, n):
    boxes, scores = spoil(*make("crowded", n, dtype=dtype))
    for threshold in (0.0, 0.3, 0.7):
        for iou_type in ("iou", "diou"):
            kept = nms(boxes, scores, threshold, iou_type=iou_type)
            # Rows with NaN might as well not be there.
            rows = torch.arange(5, n)
            assert torch.equal(kept, rows[nms(boxes[5:], scores[5:], threshold, iou_type=iou_type)])
            if n < 100:
                assert torch.equal(kept, reference.nms.nms(boxes, scores, threshold, iou_type == "diou"))
        # Infinite, inverted and flat boxes overlap nothing: they are kept and the others do not see them.
        assert set(range(7, 14)) <= set(kept.tolist())
        others = torch.tensor([i for i in range(5, n) if not 7 <= i <= 13])
        alone = others[nms(boxes[others], scores[others], threshold)]
        assert [i for i in nms(boxes, scores, threshold).tolist() if not 7 <= i <= 13] == alone.tolist()
    assert nms(torch.full((3, 4), NAN), torch.ones(3), 0.5).tolist() == []


def test_boxes_and_scores_may_differ_in_type():
    boxes, scores = make("mixed", 60)
    kept = nms(boxes.double(), scores.double(), 0.3)
    for boxes_type, scores_type in itertools.product(FLOATS[:2], FLOATS[:2]):
        assert torch.equal(nms(boxes.to(boxes_type), scores.to(scores_type), 0.3), kept)
    # Half types are compared in float32.
    assert torch.equal(nms(boxes.half(), scores, 0.3), nms(boxes.half().float(), scores, 0.3))


def test_any_strides():
    boxes, scores = make("mixed", 200)
    expected = nms(boxes, scores, 0.3)
    assert torch.equal(nms(boxes.t().contiguous().t(), scores, 0.3), expected)
    assert torch.equal(nms(boxes.repeat(1, 2)[:, :4], scores.repeat_interleave(3)[::3], 0.3), expected)
    same = boxes[:1].expand(5, 4)
    assert nms(same, scores[:1].expand(5), 0.3).tolist() == [0]


# ---- classes -------------------------------------------------------------------------------------


def union_over_classes(boxes, scores, idxs, threshold):
    """The definition of batched_nms: indices from nms of each class, by score, ties by index."""
    rows = [torch.empty(0, dtype=torch.int64)]
    for class_id in set(idxs.tolist()):
        of_class = (idxs == class_id).nonzero()[:, 0]
        rows.append(of_class[nms(boxes[of_class], scores[of_class], threshold)])
    rows = torch.cat(rows).sort().values
    return rows[torch.argsort(scores[rows], descending=True, stable=True)]


@pytest.mark.parametrize("id_type", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64, torch.bool])
@pytest.mark.parametrize("dtype", FLOATS)
def test_batched_nms_is_the_union_over_classes(dtype, id_type):
    for seed, (n, classes) in enumerate(itertools.product((0, 1, 50, 600), (1, 3, 80))):
        boxes, scores = make("crowded", n, seed, dtype)
        idxs = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed)).to(id_type)
        for threshold in (0.0, 0.4):
            expected = union_over_classes(boxes, scores, idxs, threshold)
            assert torch.equal(batched_nms(boxes, scores, idxs, threshold), expected)


def test_classes_of_any_size():
    """On a device boxes are cut into blocks of 512, where a class may begin and end anywhere, or nowhere."""
    boxes, scores = make("mixed", 1700)
    sizes = torch.tensor([500, 11, 1, 1140, 1, 47])
    idxs = torch.repeat_interleave(sizes)[torch.randperm(1700, generator=torch.Generator().manual_seed(0))]
    expected = union_over_classes(boxes, scores, idxs, 0.2)
    assert torch.equal(batched_nms(boxes, scores, idxs, 0.2), expected)
    padded = nms_padded(boxes[None], scores[None], 0.2, 2000, idxs=idxs[None])
    assert torch.equal(padded.indices[0, : padded.counts[0]], expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_class_ids(dtype):
    ids = torch.tensor([-(2**63), -5, -1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1])
    boxes, scores = make("duplicates", 400, dtype=dtype)
    idxs = ids[torch.randint(len(ids), (400,), generator=torch.Generator().manual_seed(1))]
    expected = union_over_classes(boxes, scores, idxs, 0.2)
    assert len(nms(boxes, scores, 0.2)) < len(expected) < 400
    assert torch.equal(batched_nms(boxes, scores, idxs, 0.2), expected)
    # Floating ids need not be whole numbers; -0 is 0.
    fractions = torch.tensor([0.25, 0.5, -1.5, 1e30])[idxs % 4]
    expected = union_over_classes(boxes, scores, fractions, 0.2)
    assert torch.equal(batched_nms(boxes, scores, fractions, 0.2), expected)
    twins = torch.tensor([[0.0, 0, 10, 10]]).repeat(2, 1)
    assert batched_nms(twins, torch.tensor([0.5, 0.6]), torch.tensor([0.0, -0.0]), 0.5).tolist() == [1]


def test_large_ids_and_coordinates_do_not_wash_out():
    # Shifting coordinates by the class id rounds them (offsets of 1e7 in float32, any in float16) and copies survive.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
    for class_id in (10**6, 2**31):
        idxs = torch.full((3,), class_id)
        assert batched_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), idxs, 0.5).tolist() == [0, 2]
    generator = torch.Generator().manual_seed(0)
    copies = (torch.tensor([500.0, 400, 620, 530]) + torch.rand((37, 4), generator=generator) * 4).half()
    assert len(batched_nms(copies, torch.rand(37, generator=generator).half(), torch.full((37,), 79), 0.5)) == 1


def test_classes_do_not_meet_at_negative_coordinates():
    boxes = torch.tensor([[-10.0, -10, -1, -1], [-10, -10, -1, -1]])
    assert batched_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), 0.5).tolist() == [0, 1]
    assert batched_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([1, 1]), 0.5).tolist() == [0]
    boxes = torch.tensor([[-100.0, -100, 5, 5], [-94, -94, 11, 11]])
    assert batched_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), 0.5).tolist() == [0, 1]


def test_batched_nms_matches_the_reference():
    for n, iou_type in itertools.product((0, 16, 300), ("iou", "diou")):
        boxes, scores = make("duplicates", n)
        if n:
            boxes, scores = spoil(boxes, scores)
        idxs = torch.arange(n) % 7
        expected = reference.nms.batched_nms(boxes, scores, idxs, 0.3, iou_type == "diou")
        assert torch.equal(batched_nms(boxes, scores, idxs, 0.3, iou_type=iou_type), expected)


def test_no_boxes():
    none = torch.empty(0, dtype=torch.int64)
    assert torch.equal(nms(torch.empty(0, 4), torch.empty(0), 0.5), none)
    assert torch.equal(batched_nms(torch.empty(0, 4), torch.empty(0), none, 0.5), none)


# ---- threads, memory -----------------------------------------------------------------------------


def test_results_do_not_depend_on_the_number_of_threads():
    boxes, scores = make("crowded", 3000)
    idxs = torch.arange(3000) % 40
    assert_all_equal(with_threads(lambda: (nms(boxes, scores, 0.5), batched_nms(boxes, scores, idxs, 0.5))))


MEMORY_SCRIPT = """
import resource, torch, fastcv
side = torch.arange(300_000)
corner = torch.stack([side % 550, side // 550], 1) * 10.0
boxes, scores = torch.cat([corner, corner + 9], 1), torch.rand(300_000)
fastcv.ops.nms(boxes[:9], scores[:9], 0.5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(fastcv.ops.nms(boxes, scores, 0.5)) == 300_000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_300_000_boxes_in_little_memory():
    # All are kept, each alone in its cell of the index: the most memory that nms can need. A bit matrix takes 11 GB.
    run = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 200


# ---- PyTorch's machinery -------------------------------------------------------------------------


def test_opcheck():
    boxes, scores = make("mixed", 40)
    idxs = torch.arange(40) % 3
    ops = torch.ops.fastcv
    for inputs in ((boxes, scores), (boxes.double(), scores.half()), (boxes[:0], scores[:0])):
        torch.library.opcheck(ops.nms.default, (*inputs, 0.5))
        torch.library.opcheck(ops.nms.default, (*inputs, 0.5, True))
        torch.library.opcheck(ops.batched_nms.default, (*inputs, idxs[: len(inputs[0])], 0.5))


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compile():
    def detect(boxes, scores, idxs):
        kept = nms(boxes, scores, 0.5)
        by_class = batched_nms(boxes, scores, idxs, 0.3, iou_type="diou")
        return boxes[kept] * 2, scores[by_class]

    compiled = torch.compile(detect, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (30, 50):
        boxes, scores = make("crowded", n)
        args = boxes, scores, torch.arange(n) % 3
        for have, want in zip(compiled(*args), detect(*args), strict=True):
            assert torch.equal(have, want)


def test_vmap_says_what_to_do():
    boxes, scores, idxs = torch.rand(2, 5, 4), torch.rand(2, 5), torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="nms_padded"):
        torch.vmap(lambda b, s: nms(b, s, 0.3))(boxes, scores)
    with pytest.raises(RuntimeError, match="nms_padded"):
        torch.vmap(lambda b, s, i: batched_nms(b, s, i, 0.3))(boxes, scores, idxs)


def test_compiled_kernels_are_in_use():
    operators = fastcv.build_info()["operators"]
    for name in ("nms", "batched_nms"):
        assert operators[name]["cpu"] == "compiled"


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"boxes": [[0, 0, 1, 1]]}, TypeError, "boxes: expected a Tensor, got list"),
        ({"boxes": torch.zeros(5, 4, dtype=torch.int64)}, TypeError, r"boxes: expected float32.*got torch.int64"),
        ({"boxes": torch.zeros(5, 5)}, ValueError, r"boxes: expected shape \[N, 4\], got \[5, 5\]"),
        ({"boxes": torch.zeros(2, 5, 4)}, ValueError, r"boxes: expected shape \[N, 4\], got \[2, 5, 4\]"),
        ({"scores": torch.zeros(4)}, ValueError, r"scores: expected shape \[5\], got \[4\]"),
        ({"scores": torch.zeros(5, 1)}, ValueError, r"scores: expected shape \[5\], got \[5, 1\]"),
        ({"scores": torch.zeros(5, dtype=torch.bool)}, TypeError, "scores: expected float32.*got torch.bool"),
        ({"scores": torch.zeros(5, device="meta")}, ValueError, "scores: expected the device of boxes, cpu, got meta"),
        ({"idxs": torch.zeros(4)}, ValueError, r"idxs: expected shape \[5\], got \[4\]"),
        ({"idxs": torch.zeros(5, dtype=torch.complex64)}, TypeError, "idxs: expected an integer or floating type"),
        ({"idxs": 3}, TypeError, "idxs: expected a Tensor, got int"),
        ({"idxs": torch.zeros(5, device="meta")}, ValueError, "idxs: expected the device of boxes"),
        ({"iou_threshold": "0.5"}, TypeError, "iou_threshold: expected a number, got '0.5'"),
        ({"iou_threshold": None}, TypeError, "iou_threshold: expected a number, got None"),
        ({"iou_threshold": True}, TypeError, "iou_threshold: expected a number, got True"),
        ({"iou_type": "giou"}, ValueError, 'iou_type: expected "iou" or "diou", got \'giou\''),
    ],
)
def test_errors(change, error, message):
    args = {"boxes": torch.zeros(5, 4), "scores": torch.zeros(5), "iou_threshold": 0.5} | change
    if "idxs" not in change:
        with pytest.raises(error, match=message):
            nms(**args)
    with pytest.raises(error, match=message):
        batched_nms(**({"idxs": torch.zeros(5)} | args))


def test_the_kernels_check_shapes_themselves():
    boxes, scores, ids = torch.zeros(5, 4), torch.zeros(5), torch.zeros(5, dtype=torch.int64)
    ops = torch.ops.fastcv
    for call in (
        lambda: ops.nms(boxes[:, :3], scores, 0.5),
        lambda: ops.nms(boxes, scores[:4], 0.5),
        lambda: ops.batched_nms(boxes, scores, ids[:4], 0.5),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            call()


def test_numpy_oracle_by_hand():
    boxes = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [0, 0, 0, 0]], np.float32)
    iou = iou_matrix(boxes)
    assert iou[0, 1] == np.float32(50) / np.float32(150)
    assert np.isnan(iou[2, 2])
    assert greedy(iou, ranked(boxes, np.array([0.1, 0.2, np.nan])), 0.3) == [1]
