import math

import pytest
import torch
import torch.nn.functional as F

from fastcv.ops.focal_loss import sigmoid_focal_loss

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def random_case(generator, shape, dtype=torch.float32, soft=False):
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 4
    targets = torch.rand(shape, generator=generator, dtype=torch.float64)
    return logits.to(dtype), (targets if soft else targets.round()).to(dtype)


def test_by_hand():
    # p = 1/2: cross-entropy log 2, (1 - p_t)^2 = 1/4, alpha_t = 1/4 or 3/4.
    loss = sigmoid_focal_loss(torch.zeros(2), torch.tensor([1.0, 0.0]))
    assert loss.tolist() == pytest.approx([math.log(2) / 16, 3 * math.log(2) / 16])
    # sigmoid(log 3) = 3/4 without weights and with gamma 1: 1/4 of -log(3/4), 3/4 of -log(1/4).
    logits = torch.full((2,), math.log(3.0))
    loss = sigmoid_focal_loss(logits, torch.tensor([1.0, 0.0]), alpha=-1, gamma=1)
    assert loss.tolist() == pytest.approx([math.log(4 / 3) / 4, 3 * math.log(4) / 4])


# ---- properties ----------------------------------------------------------------------------------


def test_gamma_zero_is_cross_entropy():
    logits, targets = random_case(torch.Generator().manual_seed(0), (5, 7), soft=True)
    expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    result = sigmoid_focal_loss(logits, targets, alpha=-1, gamma=0)
    torch.testing.assert_close(result, expected)
    weighted = sigmoid_focal_loss(logits, targets, alpha=0.5, gamma=0)
    torch.testing.assert_close(weighted, expected / 2)


def test_symmetry():
    logits, targets = random_case(torch.Generator().manual_seed(1), (50,), torch.float64)
    a = sigmoid_focal_loss(logits, targets, alpha=0.3, gamma=1.5)
    b = sigmoid_focal_loss(-logits, 1 - targets, alpha=0.7, gamma=1.5)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_confident_examples_keep_loss_and_derivative(gamma):
    logits = torch.tensor([15.0, -15.0, 1e4, -1e4, 1e4], requires_grad=True)
    targets = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    loss = sigmoid_focal_loss(logits, targets, alpha=-1, gamma=gamma)
    exact = math.exp(-15.0) ** (1 + gamma)  # where 1 - p_t and -log(p_t) are both exp(-15)
    assert loss[:2].tolist() == pytest.approx([exact, exact], rel=1e-4, abs=0)
    assert loss[4].item() == pytest.approx(1e4)
    loss.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[4].item() == pytest.approx(1.0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.3])
def test_derivatives(gamma):
    logits, targets = random_case(torch.Generator().manual_seed(2), (3, 4), torch.float64, soft=True)
    inputs = (logits.requires_grad_(), targets.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, t: sigmoid_focal_loss(x, t, 0.3, gamma), inputs)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_targets_of_other_types(dtype):
    logits, targets = random_case(torch.Generator().manual_seed(3), (4, 5))
    expected = sigmoid_focal_loss(logits, targets)
    assert torch.equal(sigmoid_focal_loss(logits, targets.to(dtype)), expected)


def test_derivative_at_zero():
    # sigmoid(0) - t
    logits = torch.zeros(3, requires_grad=True)
    targets = torch.tensor([0.0, 0.25, 1.0])
    sigmoid_focal_loss(logits, targets, alpha=-1, gamma=0, reduction="sum").backward()
    assert logits.grad.tolist() == [0.5, 0.25, -0.5]


def test_float32_under_autocast():
    logits = torch.full((40_000,), -9.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sigmoid_focal_loss(logits, torch.ones_like(logits))
    assert loss.dtype is torch.float32


def test_reductions():
    logits, targets = random_case(torch.Generator().manual_seed(4), (4, 5))
    loss = sigmoid_focal_loss(logits, targets)
    torch.testing.assert_close(sigmoid_focal_loss(logits, targets, reduction="sum"), loss.sum())
    torch.testing.assert_close(sigmoid_focal_loss(logits, targets, reduction="mean"), loss.mean())
    # Many float16 losses whose sum no float16 can hold.
    logits = torch.full((40_000,), -9.0).half()
    mean = sigmoid_focal_loss(logits, torch.ones_like(logits), alpha=-1, reduction="mean")
    assert mean.item() == pytest.approx(9.0, rel=1e-2)


def test_empty():
    logits = torch.zeros(0, 3, requires_grad=True)
    for reduction, expected in (("none", []), ("sum", 0.0), ("mean", 0.0)):
        loss = sigmoid_focal_loss(logits, torch.zeros(0, 3), reduction=reduction)
        assert loss.tolist() == expected
        loss.sum().backward()
    assert logits.grad.shape == (0, 3)


def test_compiles_and_exports():
    class Model(torch.nn.Module):
        def forward(self, logits, targets):
            return sigmoid_focal_loss(logits, targets, reduction="mean")

    case = random_case(torch.Generator().manual_seed(5), (6, 3))
    expected = Model()(*case)
    compiled = torch.compile(Model(), backend="eager", fullgraph=True)
    rows = torch.export.Dim("rows")
    few = tuple(x[:4] for x in case)
    exported = torch.export.export(Model(), few, dynamic_shapes=({0: rows}, {0: rows}))
    for model in (compiled, exported.module()):
        torch.testing.assert_close(model(*case), expected)


# ---- against torchvision -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_like_torchvision(dtype):
    tv = pytest.importorskip("torchvision").ops
    generator = torch.Generator().manual_seed(6)
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1}.get(dtype, 1e-5)
    for i in range(20):
        shape = [(0, 3), (1,), (4, 5), (2, 3, 4), ()][i % 5]
        logits, targets = random_case(generator, shape, dtype, soft=i % 2 == 0)
        for alpha, gamma in ((0.25, 2), (-1, 2.0), (0, 0.5), (1, 0), (0.6, 5)):
            for reduction in ("none", "sum") if 0 in shape else ("none", "sum", "mean"):
                arguments = (logits, targets, alpha, gamma, reduction)
                result, expected = (f(*arguments) for f in (sigmoid_focal_loss, tv.sigmoid_focal_loss))
                assert result.dtype is expected.dtype
                torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)


def test_derivatives_like_torchvision():
    tv = pytest.importorskip("torchvision").ops
    generator = torch.Generator().manual_seed(7)
    for i in range(50):
        logits, targets = random_case(generator, (4, 5), torch.float64, soft=i % 2 == 0)
        gradients = []
        for function in (sigmoid_focal_loss, tv.sigmoid_focal_loss):
            leaf = logits.clone().requires_grad_()
            loss = function(leaf, targets, 0.25, (0.5, 1, 2)[i % 3], "mean")
            gradients.append(torch.autograd.grad(loss, leaf))
        torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-6)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": [1.0]}, TypeError, "inputs.*Tensor.*list"),
        ({"inputs": torch.zeros(2, 3).int()}, TypeError, "inputs.*float.*int32"),
        ({"targets": None}, TypeError, "targets.*Tensor.*NoneType"),
        ({"targets": torch.zeros(3)}, ValueError, r"targets.*\[2, 3\].*\[3\]"),
        ({"alpha": 1.5}, ValueError, r"alpha.*\[0, 1\].*1.5"),
        ({"alpha": -0.5}, ValueError, r"alpha.*\[0, 1\].*-0.5"),
        ({"gamma": -1}, ValueError, "gamma.*at least 0.*-1"),
        ({"reduction": "MEAN"}, ValueError, "reduction.*'mean'.*'MEAN'"),
    ],
)
def test_errors(change, error, message):
    arguments = {"inputs": torch.zeros(2, 3), "targets": torch.zeros(2, 3), **change}
    with pytest.raises(error, match=message):
        sigmoid_focal_loss(**arguments)
