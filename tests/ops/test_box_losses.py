import math

import pytest
import torch

from fastcv.ops.box_iou import complete_box_iou, distance_box_iou, generalized_box_iou
from fastcv.ops.box_losses import (
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
)

PAIRWISE = {
    generalized_box_iou_loss: generalized_box_iou,
    distance_box_iou_loss: distance_box_iou,
    complete_box_iou_loss: complete_box_iou,
}
ALL = tuple(PAIRWISE)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def random_boxes(generator, n, dtype=torch.float32, smallest=1.0):
    boxes = torch.rand((n, 4), generator=generator, dtype=torch.float64) * 20 - 10
    boxes[:, 2:] = boxes[:, :2] + (boxes[:, 2:] + 8).clamp(min=smallest)
    return boxes.to(dtype)


# ---- by hand -------------------------------------------------------------------------------------


def test_by_hand():
    # [0, 0, 2, 2] and [1, 1, 3, 3]: 1 of 7 shared, hull 9, centres (1, 1) apart, diagonal (3, 3).
    a, b = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 1.0, 3.0, 3.0]])
    assert generalized_box_iou_loss(a, b).tolist() == pytest.approx([1 - 1 / 7 + 2 / 9])
    assert distance_box_iou_loss(a, b).tolist() == pytest.approx([1 - 1 / 7 + 2 / 18])
    assert complete_box_iou_loss(a, b).tolist() == pytest.approx([1 - 1 / 7 + 2 / 18])
    # 2 x 2 in 2 x 4: half of it, centres (0, 1) apart, diagonal (2, 4), ratios 1 and 1/2.
    b = torch.tensor([[0.0, 0.0, 2.0, 4.0]])
    v = 4 / math.pi**2 * (math.atan(1) - math.atan(1 / 2)) ** 2
    expected = 1 - 1 / 2 + 1 / 20 + v * v / (1 - 1 / 2 + v)
    assert complete_box_iou_loss(a, b).tolist() == pytest.approx([expected])


def test_eps_by_hand():
    a, b = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 1.0, 3.0, 3.0]])
    assert generalized_box_iou_loss(a, b, eps=1.0).item() == pytest.approx(1 - 1 / 8 + 2 / 10)
    assert distance_box_iou_loss(a, b, eps=1.0).item() == pytest.approx(1 - 1 / 8 + 2 / 19)
    assert complete_box_iou_loss(a, b, eps=1.0).item() == pytest.approx(1 - 1 / 8 + 2 / 19)


# ---- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ALL)
def test_is_one_minus_the_pairwise_value(loss):
    generator = torch.Generator().manual_seed(0)
    boxes1, boxes2 = (random_boxes(generator, 50, torch.float64) for _ in range(2))
    expected = 1 - PAIRWISE[loss](boxes1, boxes2).diag()
    torch.testing.assert_close(loss(boxes1, boxes2, eps=0.0), expected, atol=1e-6, rtol=0)
    assert loss(boxes1, boxes1).abs().max() < 1e-6


@pytest.mark.parametrize("loss", ALL)
def test_reductions_and_shapes(loss):
    generator = torch.Generator().manual_seed(1)
    boxes1, boxes2 = (random_boxes(generator, 6) for _ in range(2))
    values = loss(boxes1, boxes2)
    assert values.shape == (6,)
    torch.testing.assert_close(loss(boxes1, boxes2, "mean"), values.mean())
    torch.testing.assert_close(loss(boxes1, boxes2, reduction="sum"), values.sum())
    assert torch.equal(loss(boxes1.view(2, 3, 4), boxes2.view(2, 3, 4)), values.view(2, 3))
    assert torch.equal(loss(boxes1[0], boxes2[0]), values[0])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("loss", ALL)
def test_no_boxes_give_no_loss_and_a_gradient(loss, reduction):
    boxes = torch.zeros(0, 4, requires_grad=True)
    value = loss(boxes, torch.zeros(0, 4), reduction)
    assert value.tolist() == ([] if reduction == "none" else 0.0)
    value.sum().backward()
    assert boxes.grad.shape == (0, 4)


@pytest.mark.parametrize("loss", ALL)
def test_derivatives(loss):
    generator = torch.Generator().manual_seed(2)
    boxes1, boxes2 = (random_boxes(generator, 6, torch.float64).requires_grad_() for _ in range(2))
    if loss is not complete_box_iou_loss:  # which holds the weight constant: compared below
        assert torch.autograd.gradcheck(loss, (boxes1, boxes2))
    degenerate = torch.tensor([[1.0, 1, 1, 1], [0, 1, 2, 1], [1, 0, 1, 2]], requires_grad=True)
    for other in (degenerate.detach(), torch.tensor([[0.0, 0.0, 3.0, 2.0]] * 3)):
        values = loss(degenerate, other)
        assert values.isfinite().all()
        assert torch.autograd.grad(values.sum(), degenerate)[0].isfinite().all()


@pytest.mark.parametrize("loss", ALL)
def test_descent_moves_one_box_onto_another(loss):
    target = torch.tensor([[3.0, 4.0, 8.0, 6.0]])
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]], requires_grad=True)
    optimizer = torch.optim.Adam([box], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        loss(box, target, "sum").backward()
        optimizer.step()
    assert loss(box, target).item() < 0.1


def test_compiles_and_exports():
    class Model(torch.nn.Module):
        def forward(self, boxes1, boxes2):
            return [loss(boxes1, boxes2, "mean") for loss in ALL]

    generator = torch.Generator().manual_seed(3)
    both = tuple(random_boxes(generator, 5) for _ in range(2))
    expected = Model()(*both)
    compiled = torch.compile(Model(), backend="eager", fullgraph=True)
    rows = torch.export.Dim("rows")
    few = tuple(b[:3] for b in both)
    exported = torch.export.export(Model(), few, dynamic_shapes=({0: rows}, {0: rows}))
    for model in (compiled, exported.module()):
        torch.testing.assert_close(model(*both), expected)


# ---- against torchvision -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (*FLOATS, torch.int32))
@pytest.mark.parametrize("name", [loss.__name__ for loss in ALL])
def test_like_torchvision(name, dtype):
    tv = pytest.importorskip("torchvision").ops
    loss, theirs = globals()[name], getattr(tv, name)
    generator = torch.Generator().manual_seed(4)
    for i in range(60):
        n = (0, 1, 2, 7)[i % 4]
        both = [random_boxes(generator, n, dtype, smallest=0.0) for _ in range(2)]
        for reduction in ("none", "mean", "sum"):
            result, expected = (f(*both, reduction=reduction) for f in (loss, theirs))
            assert result.dtype is expected.dtype and result.shape == expected.shape
            assert result.isfinite().all()
            known = expected.isfinite()  # torchvision's CIoU: NaN for boxes of no size
            torch.testing.assert_close(result[known], expected[known], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [loss.__name__ for loss in ALL])
def test_inverted_boxes_like_torchvision(name):
    tv = pytest.importorskip("torchvision").ops
    loss, theirs = globals()[name], getattr(tv, name)
    generator = torch.Generator().manual_seed(5)
    compared = 0
    for _ in range(50):
        both = [torch.rand((6, 4), generator=generator).double() * 8 - 4 for _ in range(2)]
        expected = theirs(*both)
        torch.testing.assert_close(loss(*both), expected, atol=1e-6, rtol=1e-6)
        compared += len(expected)
    assert compared == 300


@pytest.mark.parametrize("name", [loss.__name__ for loss in ALL])
def test_derivatives_like_torchvision(name):
    tv = pytest.importorskip("torchvision").ops
    generator = torch.Generator().manual_seed(6)
    for _ in range(40):
        both = [random_boxes(generator, 5, torch.float64) for _ in range(2)]
        gradients = []
        for loss in (globals()[name], getattr(tv, name)):
            leaves = [b.clone().requires_grad_() for b in both]
            gradients.append(torch.autograd.grad(loss(*leaves, reduction="mean"), leaves))
        torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-6)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ALL)
def test_errors(loss):
    good = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"reduction.*'none', 'mean' or 'sum'.*'max'"):
        loss(good, good, "max")
    with pytest.raises(ValueError, match=r"boxes2.*\[3, 4\].*\[1, 4\]"):
        loss(good, good[:1])
    with pytest.raises(ValueError, match=r"boxes1.*4.*\[3, 5\]"):
        loss(torch.zeros(3, 5), good)
    with pytest.raises(TypeError, match=r"boxes2.*Tensor.*list"):
        loss(good, [[0, 0, 1, 1]])
