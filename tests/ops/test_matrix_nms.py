import itertools
import math

import pytest
import torch
from nms_cases import KINDS, assert_all_equal, make, spoil, with_threads

import fastcv
from fastcv import reference
from fastcv.ops import matrix_nms

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def expected(boxes, scores, idxs, kernel, sigma):
    ids = None if idxs is None else idxs[None]
    return reference.matrix_nms.matrix_nms(boxes[None], scores[None], ids, sigma, kernel == "linear")[0]


# ---- by hand -------------------------------------------------------------------------------------


def test_by_hand():
    #    0    5    10   15        a = [0, 0, 10, 10] score 0.9,  b = [5, 0, 15, 10] score 0.8,
    #  0 aaaaaaaaaa               c = [0, 0, 10, 5] score 0.7,   d = [20, 0, 30, 10] score 0.6
    #    aaaaabbbbbbbbbb          IoU(a, b) = 50 / 150, IoU(a, c) = 50 / 100, IoU(b, c) = 25 / 125
    boxes = torch.tensor([[20.0, 0, 30, 10], [0, 0, 10, 5], [5, 0, 15, 10], [0, 0, 10, 10]])
    scores = torch.tensor([0.6, 0.7, 0.8, 0.9])
    # b: 1 - 1/3. c: by a 1 - 1/2; by b (1 - 1/5) / (1 - 1/3) = 1.2, which is no less.
    want = torch.tensor([0.6, 0.7 * 0.5, 0.8 * 2 / 3, 0.9])
    torch.testing.assert_close(matrix_nms(boxes, scores, kernel="linear"), want)
    want = torch.tensor([0.6, 0.7 * math.exp(-2 / 4), 0.8 * math.exp(-2 / 9), 0.9])
    torch.testing.assert_close(matrix_nms(boxes, scores), want)
    want = torch.tensor([0.6, 0.7 * math.exp(-1), 0.8 * math.exp(-4 / 9), 0.9])
    torch.testing.assert_close(matrix_nms(boxes, scores, sigma=4.0), want)
    # Without a in their class b is lowered by none, and c by b.
    idxs = torch.tensor([1, 1, 1, 2])
    want = torch.tensor([0.6, 0.7 * 0.8, 0.8, 0.9])
    torch.testing.assert_close(matrix_nms(boxes, scores, idxs=idxs, kernel="linear"), want)


def test_forgiveness_by_hand():
    # Three boxes in a row, each 2 of 10 behind the one before: IoU 8 / 12, and 6 / 14 for the outer two. The third is
    # lowered by the first, 1 - 3/7, not by the second, (1 - 2/3) / (1 - 2/3) = 1.
    boxes = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [4, 0, 14, 10]])
    want = torch.tensor([0.9, 0.8 / 3, 0.7 * 4 / 7])
    torch.testing.assert_close(matrix_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), kernel="linear"), want)


def test_copies_by_hand():
    # Copies of a better box come to 0 (linear), and have no say: the fourth is lowered by the first alone.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 5]])
    scores = torch.tensor([0.5, 0.9, 0.9, 0.4])
    assert matrix_nms(boxes, scores, kernel="linear").tolist() == pytest.approx([0, 0.9, 0, 0.2])
    lowered = matrix_nms(boxes, scores)
    assert lowered.tolist() == pytest.approx([0.5 * math.exp(-2), 0.9, 0.9 * math.exp(-2), 0.4 * math.exp(-0.5)])


# ---- against the reference -----------------------------------------------------------------------


@pytest.mark.parametrize("kernel, sigma", [("gaussian", 2.0), ("gaussian", 0.1), ("linear", 2.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_reference_in_float64(kind, kernel, sigma):
    sizes = (0, 1, 2, 17, 130, 600) if sigma == 0.1 else (0, 1, 2, 17, 130)
    for n, classes in itertools.product(sizes, (None, 5)):
        boxes, scores = make(kind, n, seed=n, dtype=torch.float64)
        if n == 130:
            scores = (scores * 20).round()
        if n > 16:
            boxes, scores = spoil(boxes, scores)
        idxs = None if classes is None else torch.arange(n) % classes - 2
        lowered = matrix_nms(boxes, scores, idxs=idxs, kernel=kernel, sigma=sigma)
        torch.testing.assert_close(lowered, expected(boxes, scores, idxs, kernel, sigma), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_matches_the_reference_in_other_types(dtype, kernel):
    boxes, scores = make("crowded", 200, dtype=dtype)
    lowered = matrix_nms(boxes, scores, kernel=kernel)
    assert lowered.dtype == dtype
    want = expected(boxes, scores, None, kernel, 2.0)
    torch.testing.assert_close(lowered, want, rtol=1e-2 if dtype.itemsize == 2 else 2e-6, atol=1e-6)
    assert (lowered < scores).sum() > 50
    # In float32 results are those of float64 for the same numbers.
    wide = matrix_nms(boxes.double(), scores.double(), kernel=kernel)
    torch.testing.assert_close(lowered.double(), wide, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_bad_values_disturb_nobody(kernel):
    boxes, scores = spoil(*make("crowded", 300))
    boxes[5] += 5000  # whose score is infinite
    lowered = matrix_nms(boxes, scores, kernel=kernel)
    assert lowered[:5].tolist() == [0] * 5  # NaN
    assert torch.equal(lowered[7:14], scores[7:14])  # infinite, inverted and flat boxes overlap nothing
    assert torch.equal(lowered[16:], matrix_nms(boxes[16:], scores[16:], kernel=kernel))
    # Of an infinite score nothing is left where the factor is 0.
    twins = boxes[16:17].repeat(2, 1)
    assert matrix_nms(twins, torch.tensor([float("inf")] * 2), kernel="linear").tolist() == [float("inf"), 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_is_its_images(dtype):
    boxes, scores = make("crowded", 3 * 200, dtype=dtype)
    boxes, scores = boxes.view(3, 200, 4), scores.view(3, 200)
    idxs = torch.tensor([-(2**63), 2**31, 2**63 - 1])[torch.arange(600) % 3].view(3, 200)
    for ids in (None, idxs, idxs.double()):
        batch = matrix_nms(boxes, scores, idxs=ids)
        for b in range(3):
            one = matrix_nms(boxes[b], scores[b], idxs=None if ids is None else ids[b])
            assert torch.equal(batch[b], one)
    transposed = matrix_nms(boxes.transpose(0, 1).contiguous().transpose(0, 1), scores.t().contiguous().t(), idxs=idxs)
    assert torch.equal(transposed, matrix_nms(boxes, scores, idxs=idxs))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0), (0, 0)])
def test_empty(shape):
    assert matrix_nms(torch.rand(*shape, 4), torch.rand(shape)).shape == shape
    assert matrix_nms(torch.rand(*shape, 4), torch.rand(shape), idxs=torch.zeros(shape)).shape == shape


def test_results_do_not_depend_on_the_number_of_threads():
    boxes, scores = make("crowded", 3000)
    idxs = torch.arange(3000) % 7

    def results():
        yield matrix_nms(boxes, scores)
        yield matrix_nms(boxes, scores, kernel="linear", idxs=idxs)
        yield matrix_nms(boxes.view(3, 1000, 4), scores.view(3, 1000), idxs=idxs.view(3, 1000))

    assert_all_equal(with_threads(results))


# ---- PyTorch's machinery -------------------------------------------------------------------------


def test_not_differentiable():
    boxes, scores = make("crowded", 10)
    assert not matrix_nms(boxes.requires_grad_(), scores.requires_grad_()).requires_grad


def test_opcheck():
    boxes, scores = make("crowded", 40)
    boxes, scores = boxes.view(2, 20, 4), scores.view(2, 20)
    op = torch.ops.fastcv.matrix_nms.default
    torch.library.opcheck(op, (boxes, scores, None, 2.0, False))
    torch.library.opcheck(op, (boxes.half(), scores.double(), torch.arange(40).view(2, 20) % 3, 2.0, True))
    torch.library.opcheck(op, (boxes[:, :0], scores[:, :0], None, 2.0, False))
    assert fastcv.build_info()["operators"]["matrix_nms"]["cpu"] == "compiled"


def test_compile():
    def detect(boxes, scores, idxs):
        lowered = matrix_nms(boxes, scores, idxs=idxs)
        return lowered.topk(5), matrix_nms(boxes[None], scores[None], kernel="linear") * 2

    compiled = torch.compile(detect, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (30, 50):
        boxes, scores = make("crowded", n)
        have, want = (f(boxes, scores, torch.arange(n) % 2) for f in (compiled, detect))
        assert torch.equal(have[0].indices, want[0].indices)
        assert torch.equal(have[1], want[1])


def test_vmap():
    boxes, scores = make("crowded", 6 * 50)
    boxes, scores = boxes.view(2, 3, 50, 4), scores.view(2, 3, 50)
    idxs = torch.arange(50) % 3
    mapped = torch.vmap(torch.vmap(lambda b, s: matrix_nms(b, s, idxs=idxs)))(boxes, scores)
    want = matrix_nms(boxes.flatten(0, 1), scores.flatten(0, 1), idxs=idxs.expand(6, 50))
    assert torch.equal(mapped.flatten(0, 1), want)
    mapped = torch.vmap(lambda b, s: matrix_nms(b, s), (None, 2), 2)(boxes[0], torch.stack([scores[0], scores[1]], 2))
    for i in range(2):
        assert torch.equal(mapped[:, :, i], matrix_nms(boxes[0], scores[i]))
    assert torch.vmap(lambda b, s: matrix_nms(b, s))(boxes[:, :0], scores[:, :0]).shape == (2, 0, 50)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"boxes": torch.zeros(5, 3)}, ValueError, r"boxes: expected shape \[N, 4\], got \[5, 3\]"),
        ({"boxes": torch.zeros(1, 5, 3)}, ValueError, r"boxes: expected shape \[B, N, 4\], got \[1, 5, 3\]"),
        ({"boxes": torch.zeros(1, 5, 4)}, ValueError, r"scores: expected shape \[1, 5\], got \[5\]"),
        ({"boxes": torch.zeros(5, 4, dtype=torch.int32)}, TypeError, "boxes: expected float32.*got torch.int32"),
        ({"scores": torch.zeros(6)}, ValueError, r"scores: expected shape \[5\], got \[6\]"),
        ({"scores": [0.5]}, TypeError, "scores: expected a Tensor, got list"),
        ({"idxs": torch.zeros(6)}, ValueError, r"idxs: expected shape \[5\], got \[6\]"),
        ({"sigma": "2"}, TypeError, "sigma: expected a number, got '2'"),
        ({"sigma": 0.0}, ValueError, "sigma: expected a number greater than 0, got 0.0"),
        ({"kernel": "cubic"}, ValueError, 'kernel: expected "gaussian" or "linear", got \'cubic\''),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        matrix_nms(**({"boxes": torch.zeros(5, 4), "scores": torch.zeros(5)} | change))


def test_the_kernel_checks_shapes_itself():
    boxes, scores = torch.zeros(2, 5, 4), torch.zeros(2, 5)
    ids = torch.zeros(2, 4, dtype=torch.int64)
    for args in ((boxes[0], scores[0], None), (boxes, scores[:, :4], None), (boxes, scores, ids)):
        with pytest.raises(RuntimeError, match="expected shape"):
            torch.ops.fastcv.matrix_nms(*args, 2.0, False)
