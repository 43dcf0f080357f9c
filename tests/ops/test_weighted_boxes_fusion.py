import itertools

import pytest
import torch
from nms_cases import assert_all_equal, with_threads

import fastcv
from fastcv import reference
from fastcv.ops import weighted_boxes_fusion

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CONF_TYPES = ("avg", "max", "box_and_model_avg", "absent_model_aware_avg")


def detections(models, n, labels, seed=0, dtype=torch.float64):
    """Boxes in [0, 1] of several models that see the same objects, about eight boxes an object."""
    generator = torch.Generator().manual_seed(seed)
    objects = max(1, n // 8)
    centre = torch.rand((objects, 2), generator=generator) * 0.8 + 0.1
    side = torch.rand((objects, 2), generator=generator) * 0.15 + 0.02
    label = torch.randint(labels, (objects,), generator=generator)
    result = [], [], []
    for _ in range(models):
        k = torch.randint(objects, (n,), generator=generator)
        noise = torch.randn((n, 4), generator=generator) * 0.08
        c, s = centre[k] + noise[:, :2] * side[k], side[k] * (1 + noise[:, 2:])
        result[0].append(torch.cat([c - s / 2, c + s / 2], 1).clamp(0, 1).to(dtype))
        result[1].append(torch.rand(n, generator=generator, dtype=torch.float64).to(dtype))
        result[2].append(label[k])
    return result


def expected(boxes_list, scores_list, labels_list, weights, iou_thr, skip, conf_type, overflow):
    counts = [len(boxes) for boxes in boxes_list]
    weights = [1.0] * len(counts) if weights is None else weights
    tensors = (torch.cat(x) for x in (boxes_list, scores_list, labels_list))
    return reference.weighted_boxes_fusion.weighted_boxes_fusion(
        *tensors, counts, weights, iou_thr, skip, conf_type, overflow
    )


# ---- by hand -------------------------------------------------------------------------------------

# Two models see one object, a and b with IoU 80 / 100; the first sees another, c, and the second a third, of label 2.
A, B, C = [0.0, 0, 10, 10], [0.0, 0, 10, 8], [50.0, 50, 60, 60]
BOXES = [torch.tensor([C, A]), torch.tensor([B, A])]
SCORES = [torch.tensor([0.4, 0.9]), torch.tensor([0.3, 0.8])]
LABELS = [torch.tensor([1, 1]), torch.tensor([1, 2])]


@pytest.mark.parametrize(
    "conf_type, overflow, weights, want",
    [
        # The scores of {a, b}, of c and of the box of label 2.
        ("avg", False, None, [1.2 / 2, 0.4 / 2, 0.8 / 2]),
        ("max", False, None, [0.9, 0.4, 0.8]),
        ("box_and_model_avg", False, None, [1.2 / 2, 0.4 / 2, 0.8 / 2]),
        ("absent_model_aware_avg", False, None, [1.2 / 2, 0.4 / 2, 0.8 / 2]),
        ("avg", False, [3.0, 1.0], [3.0 / 2 * 2 / 4, 1.2 / 4, 0.8 / 4]),
        ("avg", True, [3.0, 1.0], [3.0 / 2 * 2 / 4, 1.2 / 4, 0.8 / 4]),
        ("max", False, [3.0, 1.0], [2.7 / 3, 1.2 / 3, 0.8 / 3]),
        ("box_and_model_avg", False, [3.0, 1.0], [3.0 / 4, 1.2 / 3 * 3 / 4, 0.8 / 1 * 1 / 4]),
        ("absent_model_aware_avg", False, [3.0, 1.0], [3.0 / 4, 1.2 / 4, 0.8 / 4]),
    ],
)
def test_by_hand(conf_type, overflow, weights, want):
    boxes, scores, labels = weighted_boxes_fusion(
        BOXES, SCORES, LABELS, weights, conf_type=conf_type, allows_overflow=overflow
    )
    order = sorted(range(3), key=lambda i: -want[i])
    score_a, score_b = 0.9 * (3 if weights else 1), 0.3
    mean = [0, 0, 10, (score_a * 10 + score_b * 8) / (score_a + score_b)]
    torch.testing.assert_close(scores, torch.tensor([want[i] for i in order]))
    torch.testing.assert_close(boxes, torch.tensor([[mean, C, A][i] for i in order]))
    assert labels.tolist() == [[1, 1, 2][i] for i in order]


def test_overflow_by_hand():
    # Three boxes of one model in one cluster: without overflow they count as one.
    args = [torch.tensor([A, A, A])], [torch.tensor([0.9, 0.6, 0.3])], [torch.tensor([0, 0, 0])]
    assert weighted_boxes_fusion(*args)[1].item() == pytest.approx(0.6)
    assert weighted_boxes_fusion(*args, allows_overflow=True)[1].item() == pytest.approx(1.8)


def test_means_move_by_hand():
    # a, then b joins and the mean moves towards b; d has IoU 0.54 with a but 80 / 140 with the mean, hence joins.
    a, b, d = [0.0, 0, 10, 10], [2.0, 0, 12, 10], [4.0, 0, 14, 10]
    args = [torch.tensor([a, b, d])], [torch.tensor([0.9, 0.9, 0.1])], [torch.tensor([0, 0, 0])]
    mean = [1.0 * 1.8 + 0.4, 0, 11 * 1.8 + 1.4, 10 * 1.9]
    boxes = weighted_boxes_fusion(*args, iou_thr=0.5)[0]
    torch.testing.assert_close(boxes, torch.tensor([[mean[0] / 1.9, 0, mean[2] / 1.9, 10]]))
    # With a threshold that b does not reach all stay apart (IoU 8 / 12), equal scores in the order given.
    boxes, scores, _ = weighted_boxes_fusion(*args, iou_thr=0.67)
    assert boxes.tolist() == [a, b, d]
    assert scores.tolist() == pytest.approx([0.9, 0.9, 0.1])


# ---- against the reference and ensemble-boxes ----------------------------------------------------


@pytest.mark.parametrize("conf_type", CONF_TYPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_matches_the_reference(dtype, conf_type):
    # Computed in float64 and rounded: half types too are equal, but for a tie of roundings.
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    for models, n, labels in ((1, 1, 1), (2, 30, 3), (3, 60, 2)):
        args = detections(models, n, labels, n, dtype)
        for overflow, weights, skip in itertools.product((False, True), (None, [2.0, 0.5, 1.0][:models]), (0.0, 0.3)):
            fused = weighted_boxes_fusion(*args, weights, 0.55, skip, conf_type, overflow)
            want = expected(*args, weights, 0.55, skip, conf_type, overflow)
            assert (fused[0].dtype, fused[1].dtype, fused[2].dtype) == (dtype, dtype, torch.int64)
            for have, wanted in zip(fused, want, strict=True):
                torch.testing.assert_close(have, wanted, **tolerance)


@pytest.mark.parametrize("conf_type", CONF_TYPES)
def test_matches_ensemble_boxes(conf_type):
    ensemble_boxes = pytest.importorskip("ensemble_boxes")
    sizes = ((1, 5, 1), (2, 30, 3), (3, 200, 4), (4, 400, 10))
    for (models, n, labels), seed, overflow in itertools.product(sizes, range(3), (False, True)):
        for weights, iou_thr, skip in ((None, 0.55, 0.0), ([1.0, 2.0, 0.5, 3.0][:models], 0.4, 0.25)):
            args = detections(models, n, labels, seed, torch.float32 if seed else torch.float64)
            fused = weighted_boxes_fusion(*args, weights, iou_thr, skip, conf_type, overflow)
            arrays = ([x.numpy() for x in part] for part in args)
            want = ensemble_boxes.weighted_boxes_fusion(*arrays, weights, iou_thr, skip, conf_type, overflow)
            for have, wanted in zip(fused, want, strict=True):
                torch.testing.assert_close(have.double(), torch.from_numpy(wanted), rtol=0, atol=1e-6)


@pytest.mark.parametrize("conf_type", CONF_TYPES)
def test_a_label_of_hundreds_of_clusters(conf_type):
    # More than fit into the shared memory of a GPU.
    args = detections(2, 500, 1)
    fused = weighted_boxes_fusion(*args, [2.0, 0.5], 0.9, 0.1, conf_type)
    want = expected(*args, [2.0, 0.5], 0.9, 0.1, conf_type, False)
    assert len(want[0]) > 600
    for have, wanted in zip(fused, want, strict=True):
        torch.testing.assert_close(have, wanted, rtol=1e-12, atol=1e-12)


def test_any_units():
    # Boxes in pixels, of both signs, fuse as boxes in [0, 1] do.
    boxes, scores, labels = detections(3, 100, 3)
    want = weighted_boxes_fusion(boxes, scores, labels)
    pixels = [b * 1024 - 300 for b in boxes]
    fused = weighted_boxes_fusion(pixels, scores, labels)
    torch.testing.assert_close((fused[0] + 300) / 1024, want[0], rtol=1e-9, atol=1e-12)
    assert torch.equal(fused[1], want[1])
    assert fused[0].min() < 0


def test_bad_values_are_skipped():
    inf, nan = float("inf"), float("nan")
    boxes, scores, labels = detections(1, 40, 2, dtype=torch.float32)
    bad = torch.tensor(
        [
            [nan, 0, 1, 1],
            [0, 0, inf, 1],
            [-inf, 0, 1, 1],
            [1, 0, 0, 1],
            [1, 1, 0, 0],
            [0, 0, 0, 1],
            [0.5, 0.5, 0.5, 0.5],
        ]
        + [[0, 0, 1, 1]] * 4
    )
    bad_scores = torch.tensor([0.5] * 7 + [nan, inf, -inf, -0.1])
    for label in (0, 1):
        fused = weighted_boxes_fusion(
            [boxes[0], bad], [scores[0], bad_scores], [labels[0], torch.full((11,), label)], [1.0, 0.5]
        )
        want = weighted_boxes_fusion(
            [boxes[0], bad[:0]], [scores[0], bad_scores[:0]], [labels[0], labels[0][:0]], [1.0, 0.5]
        )
        for have, wanted in zip(fused, want, strict=True):
            assert torch.equal(have, wanted)


def test_scores_of_zero_keep_the_first_box():
    boxes, scores, _ = weighted_boxes_fusion(BOXES, [s * 0 for s in SCORES], LABELS)
    assert boxes.tolist() == [C, A, A]
    assert scores.tolist() == [0, 0, 0]
    # A model of weight 0 takes part with scores of 0.
    for conf_type in ("avg", "max", "box_and_model_avg", "absent_model_aware_avg"):
        boxes, scores, labels = weighted_boxes_fusion(BOXES, SCORES, LABELS, [1, 0], conf_type=conf_type)
        assert boxes.tolist() == [A, C, A]
        assert scores.isfinite().all() and scores[2] == 0
    boxes, scores, labels = weighted_boxes_fusion(BOXES, SCORES, LABELS, [1, 0])
    assert scores.tolist() == pytest.approx([0.9, 0.4, 0.0])
    assert labels.tolist() == [1, 1, 2]


def test_thresholds():
    # Greater than iou_thr, and not less than skip_box_thr as PyTorch compares.
    a, b = [0.0, 0, 10, 10], [0.0, 0, 10, 5]
    args = [torch.tensor([a, b])], [torch.tensor([0.9, 0.7])], [torch.tensor([0, 0])]
    assert len(weighted_boxes_fusion(*args, iou_thr=0.5)[0]) == 2
    assert len(weighted_boxes_fusion(*args, iou_thr=0.499)[0]) == 1
    assert (torch.tensor(0.7) >= 0.7).item()  # although float32(0.7) < 0.7
    assert len(weighted_boxes_fusion(*args, iou_thr=0.5, skip_box_thr=0.7)[0]) == 2
    assert len(weighted_boxes_fusion(*args, iou_thr=0.5, skip_box_thr=0.7001)[0]) == 1


@pytest.mark.parametrize("label_type", [torch.int64, torch.int32, torch.uint8, torch.int8])
def test_labels_and_empties(label_type):
    empty = torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=label_type)
    fused = weighted_boxes_fusion(*([x, x] for x in empty))
    assert [tuple(x.shape) for x in fused] == [(0, 4), (0,), (0,)]
    labels = [x.to(label_type) for x in LABELS]
    fused = weighted_boxes_fusion([BOXES[0], empty[0]], [SCORES[0], empty[1]], [labels[0], empty[2]])
    assert fused[0].tolist() == [A, C]
    assert fused[1].tolist() == pytest.approx([0.45, 0.2])
    assert fused[2].dtype == label_type
    far = torch.tensor([-(2**63), 2**63 - 1])
    fused = weighted_boxes_fusion([torch.tensor([A, A])], [torch.tensor([0.1, 0.2])], [far])
    assert fused[2].tolist() == far.flip(0).tolist()


def test_results_do_not_depend_on_the_number_of_threads():
    args = detections(4, 2000, 30)
    assert_all_equal(with_threads(lambda: weighted_boxes_fusion(*args)))


# ---- PyTorch's machinery -------------------------------------------------------------------------


def test_not_differentiable():
    boxes, scores, labels = detections(2, 10, 1)
    fused = weighted_boxes_fusion([b.requires_grad_() for b in boxes], [s.requires_grad_() for s in scores], labels)
    assert not fused[0].requires_grad
    assert not fused[1].requires_grad


def test_opcheck():
    boxes, scores, labels = (torch.cat(x) for x in detections(2, 20, 2))
    op = torch.ops.fastcv.weighted_boxes_fusion.default
    for conf_type in CONF_TYPES:
        torch.library.opcheck(op, (boxes, scores, labels, [20, 20], [1.0, 2.0], 0.55, 0.0, conf_type, False))
    half = boxes.half(), scores.float(), labels.int()
    torch.library.opcheck(op, (*half, [5, 35], [1.0, 2.0], 0.55, 0.2, "avg", True))
    torch.library.opcheck(op, (boxes[:0], scores[:0], labels[:0], [0], [1.0], 0.55, 0.2, "avg", True))
    assert fastcv.build_info()["operators"]["weighted_boxes_fusion"]["cpu"] == "compiled"


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compile():
    def fuse(boxes, scores, labels):
        fused = weighted_boxes_fusion(boxes, scores, labels, [1.0, 2.0], conf_type="max")
        return fused[0] * 2, fused[1] + 1, fused[2]

    compiled = torch.compile(fuse, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (20, 33):
        args = detections(2, n, 2)
        for have, want in zip(compiled(*args), fuse(*args), strict=True):
            assert torch.equal(have, want)


def test_vmap_says_what_to_do():
    with pytest.raises(RuntimeError, match="loop over the images"):
        torch.vmap(lambda b, s, i: weighted_boxes_fusion([b], [s], [i]))(
            torch.rand(2, 5, 4), torch.rand(2, 5), torch.zeros(2, 5, dtype=torch.int64)
        )


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"boxes_list": BOXES[0]}, ValueError, "boxes_list: expected a list of at least one tensor"),
        ({"boxes_list": []}, ValueError, "boxes_list: expected a list of at least one tensor"),
        ({"boxes_list": [BOXES[0], BOXES[1][:1]]}, ValueError, r"scores_list\[1\]: expected shape \[1\], got \[2\]"),
        ({"boxes_list": [BOXES[0], BOXES[1].long()]}, TypeError, r"boxes_list\[1\]: expected float32.*torch.int64"),
        ({"boxes_list": [BOXES[0], BOXES[1][0]]}, ValueError, r"boxes_list\[1\]: expected shape \[N, 4\], got \[4\]"),
        ({"scores_list": SCORES[:1]}, ValueError, "scores_list: expected a list of 2 tensors"),
        ({"scores_list": SCORES[0]}, ValueError, "scores_list: expected a list of 2 tensors"),
        ({"scores_list": [[0.5, 0.5], SCORES[1]]}, TypeError, r"scores_list\[0\]: expected a Tensor, got list"),
        ({"labels_list": [x.float() for x in LABELS]}, TypeError, r"labels_list\[0\]: expected an integer type"),
        ({"labels_list": [x[:1] for x in LABELS]}, ValueError, r"labels_list\[0\]: expected shape \[2\], got \[1\]"),
        ({"weights": [1.0]}, ValueError, "weights: expected 2 numbers, one for each model, got 1"),
        (
            {"weights": [1.0, -1.0]},
            ValueError,
            r"weights: expected numbers of at least 0, not all 0, got \[1.0, -1.0\]",
        ),
        ({"weights": [0.0, 0.0]}, ValueError, "weights: expected numbers of at least 0, not all 0"),
        ({"weights": [1.0, float("nan")]}, ValueError, "weights: expected numbers of at least 0, not all 0"),
        ({"iou_thr": "a"}, TypeError, "iou_thr: expected a number, got 'a'"),
        ({"skip_box_thr": -0.5}, ValueError, "skip_box_thr: expected at least 0, got -0.5"),
        ({"conf_type": "mean"}, ValueError, 'conf_type: expected "avg" or "max" or .*, got \'mean\''),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        weighted_boxes_fusion(**({"boxes_list": BOXES, "scores_list": SCORES, "labels_list": LABELS} | change))


def test_the_kernel_checks_its_arguments_itself():
    boxes, scores, labels = torch.zeros(5, 4), torch.zeros(5), torch.zeros(5, dtype=torch.int64)
    rest = (0.55, 0.0)
    for args in (
        (boxes[:, :3], scores, labels, [5], [1.0], *rest, "avg", False),
        (boxes, scores[:4], labels, [5], [1.0], *rest, "avg", False),
        (boxes, scores, labels[:4], [5], [1.0], *rest, "avg", False),
        (boxes, scores, labels, [4], [1.0], *rest, "avg", False),
        (boxes, scores, labels, [6, -1], [1.0, 1.0], *rest, "avg", False),
        (boxes, scores, labels, [5], [1.0, 1.0], *rest, "avg", False),
        (boxes, scores, labels, [], [], *rest, "avg", False),
        (boxes, scores, labels, [5], [1.0], *rest, "median", False),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.fastcv.weighted_boxes_fusion(*args)
