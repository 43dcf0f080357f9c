"""accelerate: the same outputs, from models small enough to read and from torchvision's."""

import copy
import math
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastcv


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def norm(channels):
    layer = nn.BatchNorm2d(channels)
    layer.running_mean.normal_(0, 0.2)
    layer.running_var.uniform_(0.5, 1.5)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias)
    return layer


def check(model, *inputs, parts=None, left=0, tolerance=1e-5):
    """Accelerated model, after two calls that agree with the original."""
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = fastcv.accelerate(model)
    with torch.inference_mode():
        expected = model(*inputs)
        for _ in range(2):
            torch.testing.assert_close(fast(*inputs), expected, rtol=1e-4, atol=tolerance)
    assert type(fast) is type(model) and list(fast.state_dict()) == list(before)
    assert "forward" not in model.__dict__
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    report = fast.fastcv_report
    assert parts is None or [(p.convolutions, p.fused) for p in report.parts] == parts, str(report)
    assert len(report.left) == left, str(report)
    return fast


class Residual(nn.Module):
    def __init__(self, add):
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding=1), norm(8)
        self.relu, self.add = nn.ReLU(inplace=True), add

    def forward(self, x):
        y = self.relu(self.first_norm(self.first(x)))
        return self.relu(self.add(self.second_norm(self.second(y)), x))


def add_in_place(a, b):
    a += b
    return a


@pytest.mark.parametrize("add", [torch.add, add_in_place, lambda a, b: b + a], ids=["add", "iadd", "radd"])
def test_residual_blocks(add):
    check(nn.Sequential(Residual(add), Residual(add)), torch.randn(2, 8, 9, 11), parts=[(4, 10)])


@pytest.mark.parametrize(
    "activation", [nn.ReLU6(), nn.LeakyReLU(0.2), nn.SiLU(), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.GELU()]
)
def test_activations(activation):
    model = nn.Sequential(nn.Conv2d(3, 10, 3, stride=2), norm(10), activation)
    check(model, torch.randn(1, 3, 9, 9), parts=[(1, 2)])


def test_broadcast_additions():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return F.relu(self.conv(x) + self.gate(x.mean((2, 3), keepdim=True)))

    check(Model(), torch.randn(2, 4, 5, 6))


def test_values_used_twice_are_kept():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(4, 4, 3, padding=1), norm(4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            z = self.norm(y)
            return F.relu(z) + y, self.last(z).sigmoid()

    check(Model(), torch.randn(1, 4, 6, 6))


def test_inputs_written_in_place():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), norm(4)

        def forward(self, x):
            x = self.stem(x)
            y = self.conv(x)
            shortcut = F.relu(x, inplace=True)
            return F.relu(self.norm(y) + shortcut)

    check(Model(), torch.randn(1, 4, 6, 6))


def test_shared_layers_and_dictionaries():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), norm(4)

        def forward(self, x):
            out = OrderedDict()
            for i in range(3):
                x = F.relu(self.norm(self.conv(x)))
                out[str(i)] = x
            return out

    fast = check(Model(), torch.randn(1, 4, 6, 6), parts=[(3, 6)])
    with torch.inference_mode():
        assert type(fast(torch.randn(1, 4, 6, 6))) is OrderedDict


def test_control_flow_keeps_its_python():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU())
            self.head = nn.Conv2d(8, 5, 1)

        def forward(self, x):
            y = self.body(x)
            if y.sum() > 0:
                y = 2 * y
            return self.head(y).view(len(y), -1)

    fast = check(Model(), torch.randn(2, 3, 8, 8), parts=[(1, 2), (1, 0)])
    assert [part.name for part in fast.fastcv_report.parts] == ["body", "head"]


def test_optional_arguments():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x, other=None, scale=1.0):
            y = self.conv(x)
            return y * scale if other is None else y + other

    model = Model().eval()
    x = torch.randn(1, 3, 6, 6)
    fast = check(model, x, parts=[(1, 0)])
    with torch.inference_mode():
        for arguments in ((x, x), (x, None, 2.0)):
            torch.testing.assert_close(fast(*arguments), model(*arguments))
        torch.testing.assert_close(fast(x, scale=3.0), model(x, scale=3.0))


def test_decisions_that_tracing_cannot_see_are_found_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.conv(x) if isinstance(x, torch.Tensor) else 7 * self.conv(x)

    fast = check(Model(), torch.randn(1, 3, 6, 6), parts=[], left=1)
    assert "other results" in str(fast.fastcv_report)


def test_maxima_as_good_as_equal():
    """Where all that a window sees is equal, rounding decides which of its maxima is the greatest."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(16, 64, 3, padding=1), nn.Conv2d(64, 8, 3, padding=1)
            self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

        def forward(self, x):
            return self.second(self.unpool(*self.pool(self.first(x))))

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(1, 16, 96, 96)
    x[..., 20:26, 20:26] = x[..., 20:21, 20:21]
    fast = fastcv.accelerate(model)
    with torch.inference_mode():
        fast(x)
        actual, expected = fast(x), model(x)
    assert "left as it is" not in str(fast.fastcv_report)
    moved = ((actual - expected).abs() > 1e-4 * expected.abs().max()).float().mean()
    assert moved < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_only_some_elements_may_move(dtype):
    from fastcv.accelerate._capture import _close

    expected = torch.arange(10000.0).view(1, 1, 100, 100).to(dtype)
    for wrong, moved, accepted in ((50, 0.01, True), (200, 0.01, False), (1, 0.0, False), (0, 0.0, True)):
        actual = expected.clone()
        actual.view(-1)[:wrong] += 500
        assert _close([actual], [expected], 1e-4, moved) is accepted


def test_hooks_are_left_alone():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)), nn.Conv2d(4, 4, 1))
    seen = []
    fast = fastcv.accelerate(model)
    model[0][0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    fast = fastcv.accelerate(model)
    with torch.inference_mode():
        fast(torch.randn(1, 3, 6, 6))
    count = len(seen)
    with torch.inference_mode():
        fast(torch.randn(1, 3, 6, 6))
    assert len(seen) == count + 1


def test_changed_parameters_are_noticed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU()).eval()
    fast, x = fastcv.accelerate(model), torch.randn(1, 3, 6, 6)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU()).eval()
    with torch.inference_mode():
        fast(x)
    fast.load_state_dict(other.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), other(x))
    fast[0].weight = nn.Parameter(torch.zeros_like(fast[0].weight))
    with torch.inference_mode():
        torch.testing.assert_close(
            fast(x)[0, :, 0, 0],
            other(torch.zeros_like(x))[0, :, 0, 0] * 0 + fast[1](fast[0].bias[None, :, None, None])[0, :, 0, 0].relu(),
        )
    assert fast[1].weight is model[1].weight  # parameters are shared


def test_copies_have_their_own_parameters():
    fast, x = fastcv.accelerate(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4))), torch.randn(1, 3, 6, 6)
    with torch.inference_mode():
        expected = fast(x)
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        fast[0].weight.zero_()
    with torch.inference_mode():
        torch.testing.assert_close(twin(x), expected)


def test_gradients_and_training_run_as_before():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU())
    fast = fastcv.accelerate(model)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    fast(x).sum().backward()
    assert x.grad is not None and fast[0].weight.grad is not None
    mean = fast[1].running_mean.clone()
    fast.train()
    fast(x)
    assert not torch.equal(fast[1].running_mean, mean)


def test_inplace_and_other_types():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert fastcv.accelerate(model, inplace=True) is model
    with torch.inference_mode():
        assert model.double()(torch.randn(1, 3, 6, 6, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        fastcv.accelerate(lambda x: x)


def test_nothing_to_do():
    fast = fastcv.accelerate(nn.ReLU())
    assert str(fast.fastcv_report) == "nothing to accelerate was found"


def randomise(model):
    for module in model.modules():
        if type(module).__name__ in ("BatchNorm2d", "FrozenBatchNorm2d"):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.5)
    return model.eval()


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnext50_32x4d",
        "mobilenet_v3_small",
        "shufflenet_v2_x0_5",
        "densenet121",
        "squeezenet1_1",
        "googlenet",
    ],
)
def test_classifiers_of_torchvision(name):
    models = pytest.importorskip("torchvision").models
    options = {"init_weights": False} if name == "googlenet" else {}
    model = randomise(models.get_model(name, weights=None, **options))
    x = torch.randn(2, 3, 96, 72)
    fast = fastcv.accelerate(model)
    with torch.inference_mode():
        expected = model(x)
        for _ in range(2):
            assert (fast(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert len(fast.fastcv_report.parts) == 1 and not fast.fastcv_report.left


def test_a_detector_of_torchvision():
    detection = pytest.importorskip("torchvision").models.detection
    build = detection.fasterrcnn_mobilenet_v3_large_320_fpn
    model = randomise(build(weights=None, weights_backbone=None, box_score_thresh=0.0))
    with torch.no_grad():  # scores further apart than random weights give: equal ones have no order
        model.rpn.head.cls_logits.weight.mul_(100)
        model.roi_heads.box_predictor.cls_score.weight.mul_(30)
    image = torch.rand(3, 200, 260)
    fast = fastcv.accelerate(model)
    with torch.inference_mode():
        expected = model([image])[0]
        for _ in range(2):
            result = fast([image])[0]
            assert len(result["labels"]) == len(expected["labels"]) > 50
            far = (result["boxes"][:, None] - expected["boxes"]).abs().amax(2)
            same = (far < 0.05) & (result["labels"][:, None] == expected["labels"])
            assert same.any(1).float().mean() >= 0.95  # a few lie on the edge of a threshold
    assert "backbone" in [part.name for part in fast.fastcv_report.parts]


def test_assertions_are_kept():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            torch._assert(x.shape[2] == x.shape[3], "expected a square")
            return self.conv(x)

    fast = check(Model(), torch.randn(1, 3, 8, 8), parts=[(1, 0)])
    with torch.inference_mode(), pytest.raises(AssertionError, match="expected a square"):
        fast(torch.randn(1, 3, 8, 9))


def test_shapes_that_depend_on_data():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return torch.nonzero(self.conv(x) > 0)

    fast = check(Model(), torch.randn(1, 3, 8, 8), parts=[], left=1)
    assert "shapes in it cannot be followed" in str(fast.fastcv_report)


def test_what_tracing_writes_to_a_model_is_undone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.seen = nn.Conv2d(3, 4, 3), None

        def forward(self, x):
            if self.seen is None:
                self.seen = x.shape
            return self.conv(x)

    fast = fastcv.accelerate(Model())
    assert fast.seen is None


_ALONE = """
import sys, torch, fastcv
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
    def forward(self, x):
        x.relu_()
        return self.head(self.conv(x).mean((2, 3)))

torch.manual_seed(0)
model = Block().eval()
x = torch.randn(1, 3, 9, 9)
fast = fastcv.accelerate(model)
with torch.inference_mode():
    for _ in range(2):
        torch.testing.assert_close(fast(x.clone()), model(x.clone()))
assert len(fast.fastcv_report.parts) == 1, fast.fastcv_report
assert "torch._dynamo" not in sys.modules
print("as it should be")
"""


def test_torchs_compiler_is_not_imported():
    """It takes a second and 150 MB; shapes are found without it where nothing else has imported it."""
    result = subprocess.run([sys.executable, "-c", _ALONE], capture_output=True, text=True, timeout=100)
    assert result.stdout.strip() == "as it should be", result.stderr


def test_results_are_compared_piece_by_piece():
    close = sys.modules["fastcv.accelerate._capture"]._close_tensors
    expected = torch.randn(2, 3, 100, 7).contiguous(memory_format=torch.channels_last)
    for place in ((0, 0, 0, 0), (1, 2, 99, 6), (1, 0, 50, 3)):
        other = expected.clone()
        other[place] += 1e-3
        assert not close(other, expected, 1e-5)
        assert close(other, expected, 1e-2)
        other[place] = math.nan
        assert not close(other, expected, 1.0)
        assert close(other, other, 1e-5)


def test_infinities_hide_no_difference():
    close = sys.modules["fastcv.accelerate._capture"]._close_tensors
    expected = torch.tensor([[1.0, -math.inf, 5.0]])
    assert close(expected.clone(), expected, 1e-4)
    assert not close(torch.tensor([[1.0, -math.inf, -100.0]]), expected, 1e-4)
    assert not close(torch.tensor([[1.0, math.inf, 5.0]]), expected, 1e-4)
    assert not close(torch.tensor([[-math.inf, -math.inf, 5.0]]), expected, 1e-4)
    assert close(torch.tensor(2.0), torch.tensor(2.0), 1e-5)
    assert not close(torch.tensor([1, 2]), torch.tensor([1, 3]), 1.0)
