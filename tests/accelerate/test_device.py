"""Programs as calls of operators, as they run on CUDA devices: here on tensors of the CPU, in the place of the compiled
ones."""

import sys
from unittest import mock

import pytest
import torch
from program_cases import (
    STEPS,
    UNPOOLINGS,
    Block,
    Function,
    Pyramid,
    Skip,
    Unpooled,
    assert_alike,
    generator,
    programs,
    randomise_norms,
)
from torch import nn

import fastcv
from fastcv import _library
from fastcv.accelerate import _capture, _device, _program
from fastcv.accelerate._steps import OPS

if fastcv.build_info()["operators"]["conv2d"]["cpu"] != "compiled":
    pytest.skip("the compiled part is not built", allow_module_level=True)

CPU = torch.device("cpu")
load_compiled = _program.Program._load_on_cpu


@pytest.fixture(autouse=True)
def by_calls(monkeypatch):
    """Programs of the CPU are loaded as those of other devices."""
    torch.manual_seed(0)
    monkeypatch.setattr(_program.Program, "_load_on_cpu", lambda program: program._load_by_calls(CPU))


def check_rounded(model, x, tolerance=0.05):
    fast = fastcv.accelerate(model, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = model(x)
        for _ in range(2):
            result = fast(x)
            assert result.dtype == torch.float32 and result.shape == expected.shape
            assert (result - expected).abs().max() <= tolerance * expected.abs().max()
    assert not fast.fastcv_report.left, str(fast.fastcv_report)
    assert all(type(program._latest[0]) is _device.OnDevice for program in programs(fast))


def test_every_step_is_served():
    assert set(_device._MAKERS) == set(OPS)


@pytest.mark.parametrize("name", STEPS)
def test_steps(name):
    model = randomise_norms(Function(STEPS[name]).eval())
    fast = fastcv.accelerate(model)
    maps = [torch.randn(size) for size in ((2, 12, 17, 13), (1, 12, 9, 10))]
    assert_alike(fast, model, maps[0], maps[1].contiguous(memory_format=torch.channels_last))
    assert len(fast.fastcv_report.parts) == 1 and not fast.fastcv_report.left
    check_rounded(model, maps[1])


@pytest.mark.parametrize(("options", "sizes"), UNPOOLINGS)
def test_unpooling(options, sizes):
    model = Unpooled(**options).eval()
    fast = fastcv.accelerate(model)
    assert_alike(fast, model, *(torch.randn(2, 5, *size) for size in sizes))
    assert programs(fast)[0].taken and not fast.fastcv_report.parts[0].torch_calls


def test_unpooling_of_windows_larger_than_bytes_count():
    model = Unpooled(channels=3, kernel=16).eval()
    fast = fastcv.accelerate(model)
    assert_alike(fast, model, torch.randn(1, 5, 32, 16))


def test_unpooling_to_another_size():
    fast = fastcv.accelerate(Unpooled().eval())
    with torch.inference_mode():
        fast(torch.randn(1, 5, 16, 16))
        with pytest.raises(RuntimeError, match="to 16x16 what was pooled from 17x16: give its size as output_size"):
            fast(torch.randn(1, 5, 17, 16))


class Shuffled(nn.Module):
    """As in ShuffleNet, with a scale of channels and slopes of their own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.BatchNorm2d(16)
        self.act, self.last = nn.PReLU(16), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x)], 1)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.last(self.act(self.norm(y).relu() + y))


CASES = {
    "skips": lambda: nn.Sequential(Skip(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)), nn.Conv2d(3, 4, 1)),
    "layer_norm": lambda: nn.Sequential(
        nn.Conv2d(3, 12, 1), Block(12), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 7), nn.ReLU()
    ),
    "norm_before": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 1), nn.Conv2d(5, 1, 3)),
    "one_channel": lambda: nn.Sequential(nn.Conv2d(3, 1, 1), nn.ConvTranspose2d(1, 6, 2, 2), nn.Tanh()),
    "merge": Pyramid,
    "interleave": Shuffled,
}


@pytest.mark.parametrize("name", CASES)
def test_models(name):
    model = randomise_norms(CASES[name]().eval())
    fast = fastcv.accelerate(model)
    assert_alike(fast, model, torch.randn(2, 3, 11, 8), torch.randn(1, 3, 6, 9), torch.randn(0, 3, 6, 6))
    check_rounded(model, torch.randn(2, 3, 11, 8))
    (program,), x = programs(fast), torch.randn(2, 3, 11, 8)
    with torch.no_grad():
        for result, compiled in zip(program(x), load_compiled(program).run(x), strict=True):
            assert (result.dtype, result.stride()) == (compiled.dtype, compiled.stride())


def test_generator_of_one_pixel():
    model = generator()
    fast = fastcv.accelerate(model)
    assert_alike(fast, model, torch.randn(2, 20, 1, 1))
    assert len(programs(fast)[0].listing.steps) == 3
    check_rounded(model, torch.randn(2, 20, 1, 1))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_classifiers_of_torchvision(name):
    model = pytest.importorskip("torchvision").models.get_model(name, weights=None).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.8, 1.5)
    fast, x = fastcv.accelerate(model), torch.randn(1, 3, 64, 40)
    with torch.inference_mode():
        expected = model(x)
        for _ in range(2):
            assert (fast(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert len(programs(fast)) == 1 and not fast.fastcv_report.left


def test_unet():
    from benchmarks.systems import UNet, with_statistics

    model = with_statistics(UNet(channels=(8, 12, 16))).eval()
    fast = fastcv.accelerate(model)
    assert_alike(fast, model, torch.randn(1, 3, 16, 24))
    check_rounded(model, torch.randn(1, 3, 16, 24))


def test_layers_used_twice_are_laid_out_once():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), conv, nn.ReLU(), conv).eval()
    fast, x = fastcv.accelerate(randomise_norms(model)), torch.randn(1, 4, 6, 6)
    assert_alike(fast, model, x)
    listing = programs(fast)[0].listing
    weights = _device._Weights(torch.float32)
    laid = [weights.of_convolution(step)[0] for step in listing.steps]
    assert laid[0] is not laid[1] and laid[1] is laid[2]
    assert laid[1].data_ptr() != conv.weight.data_ptr() and laid[1].is_contiguous(memory_format=torch.channels_last)


def test_changed_parameters_are_noticed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU()).eval()
    fast, x = fastcv.accelerate(model), torch.randn(1, 3, 6, 6)
    assert_alike(fast, model, x)
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[2].weight.add_(1)
    assert_alike(fast, model, x)
    model[1].running_var.fill_(3)
    assert_alike(fast, model, x)


def test_results_are_nobody_elses_memory():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            halves = y.chunk(2, 1)
            return y, halves[0], halves[1], torch.flatten(x, 1), torch.flatten(y, 1)

    model, x = Model().eval(), torch.randn(2, 4, 1, 1)
    fast = fastcv.accelerate(model)
    with torch.inference_mode():
        for _ in range(2):
            results = fast(x)
            for got, wanted in zip(results, model(x), strict=True):
                torch.testing.assert_close(got, wanted)
    places = {t.untyped_storage().data_ptr() for t in (x, *results)}
    assert len(places) == 6


def test_inputs_and_weights_of_other_devices():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    fast, x = fastcv.accelerate(model), torch.randn(1, 3, 6, 6)
    with torch.inference_mode():
        fast(x)
    (program,) = programs(fast)
    with torch.no_grad(), pytest.raises(RuntimeError, match="weight: expected on meta, where the inputs are, got cpu"):
        program(x.to("meta"))
    with torch.no_grad(), pytest.raises(RuntimeError, match="expected them on one device, got cpu and meta"):
        program(x, x.to("meta"))
    assert_alike(fast, model, x)
    fast.to("meta")
    with torch.no_grad(), pytest.raises(RuntimeError, match="weight: expected on cpu, where the inputs are, got meta"):
        program(x)


def test_another_device():
    """The choice is made at the call, and the report tells of it."""
    fast = fastcv.accelerate(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    with torch.no_grad():
        fast(torch.randn(1, 3))
        assert " on " not in str(fast.fastcv_report)
        fast.to("meta")
        (program,) = programs(fast)
        assert program(torch.empty(2, 3, device="meta"))[0].shape == (2, 4)
    assert "; on meta in float32" in str(fast.fastcv_report)
    with pytest.raises(RuntimeError, match="inputs: expected on the CPU, whose programs are measured"):
        program.profile(torch.empty(2, 3, device="meta"))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_types_and_devices_of_a_model_on_cuda(dtype, monkeypatch):
    """With fake tensors, for which there need be no such device, and no compiled part either."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(_capture, "_close", lambda *_: True)  # they have no numbers
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock())
    monkeypatch.setattr(sys.modules["fastcv.accelerate"], "cpu_loaded", False)
    monkeypatch.setattr(_library, "cpu_loaded", False)
    with FakeTensorMode():
        for make in (*CASES.values(), lambda: nn.Sequential(nn.Conv2d(3, 5, 1), Unpooled())):
            with torch.device("cuda"):
                model, x = make().eval(), torch.randn(2, 3, 16, 8)
            fast = fastcv.accelerate(model, dtype=dtype)
            with torch.no_grad():
                fast(x)
                result, expected = fast(x), model(x)
            assert (result.device, result.dtype, result.shape) == (x.device, torch.float32, expected.shape)
            assert f"; on cuda:0 in {str(dtype)[6:]}" in str(fast.fastcv_report)


def test_options():
    with pytest.raises(ValueError, match=r"got torch\.float16, which is for models on CUDA devices"):
        fastcv.accelerate(nn.Conv2d(3, 4, 3), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"got torch\.float64$"):
        fastcv.accelerate(nn.Conv2d(3, 4, 3), dtype=torch.float64)
    with pytest.raises(TypeError, match="graphs: expected a bool, got 1"):
        fastcv.accelerate(nn.Conv2d(3, 4, 3), graphs=1)
