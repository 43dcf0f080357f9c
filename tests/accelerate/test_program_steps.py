"""Steps of programs against torch's layers."""

import pytest
import torch
import torch.nn.functional as F
from program_cases import (
    STEPS,
    UNPOOLINGS,
    Block,
    Function,
    Pyramid,
    Unpooled,
    assert_alike,
    generator,
    programs,
    randomise_norms,
)
from torch import nn

import fastcv
from fastcv.accelerate._table import program_table
from fastcv.ops.conv2d import KERNELS

if fastcv.build_info()["operators"]["conv2d"]["cpu"] != "compiled":
    pytest.skip("the compiled part is not built", allow_module_level=True)


@pytest.mark.parametrize("name", STEPS)
def test_steps(name):
    torch.manual_seed(0)
    model = randomise_norms(Function(STEPS[name]).eval())
    fast = fastcv.accelerate(model)
    maps = [torch.randn(size) for size in ((2, 12, 17, 13), (1, 12, 40, 33), (3, 12, 9, 9), (2, 12, 17, 13))]
    maps[1:3] = [x.contiguous(memory_format=torch.channels_last) for x in maps[1:3]]
    maps.append(maps[0].contiguous(memory_format=torch.channels_last))
    assert_alike(fast, model, *maps)
    assert len(fast.fastcv_report.parts) == 1 and not fast.fastcv_report.left


def test_layer_norm_and_linear_layers():
    torch.manual_seed(0)
    model = nn.Sequential(
        Block(20), Block(20), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(80, 7), nn.ReLU()
    ).eval()
    fast = fastcv.accelerate(model)
    assert_alike(fast, model, *(torch.randn(n, 20, 11, 8) for n in (2, 1, 5)), tolerance=1e-4)
    assert [s.op for s in programs(fast)[0].listing.steps].count("conv") == 7  # scale and addition are taken up
    assert len(programs(fast)[0].listing.steps) == 11


def test_generator_of_one_pixel():
    """As in DCGAN: the first layer's input is a vector, and every norm goes into the weights before it."""
    torch.manual_seed(0)
    model = generator()
    fast = fastcv.accelerate(model)
    x = torch.randn(5, 20, 1, 1)
    assert_alike(fast, model, x[:2], x, x[:1])
    (program,) = programs(fast)
    assert len(program.listing.steps) == program.convolutions == 3
    assert "transposed 4x4/2" in program_table(program, x)


@pytest.mark.parametrize(("options", "sizes"), UNPOOLINGS)
def test_unpooling(options, sizes):
    torch.manual_seed(0)
    model = Unpooled(**options).eval()
    fast = fastcv.accelerate(model)
    with torch.inference_mode():
        for n, size in enumerate(sizes):
            x = torch.randn(2 - n % 2, 5, *size)
            for _ in range(2):
                torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=2e-5)
    (program,) = programs(fast)
    assert not fast.fastcv_report.parts[0].torch_calls
    assert [step.op for step in program.listing.steps].count("max_unpool") == 1


def test_unpooling_to_another_size():
    fast = fastcv.accelerate(Unpooled().eval())
    with torch.inference_mode():
        fast(torch.randn(1, 5, 16, 16))
        with pytest.raises(RuntimeError, match="to 16x16 what was pooled from 17x16: give its size as output_size"):
            fast(torch.randn(1, 5, 17, 16))


@pytest.mark.parametrize("padding", [0, 1])
def test_indices_that_are_wanted(padding):
    """Outside of the program they are made in, or of windows that overlap: torch's."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(5, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            y, indices = F.max_pool2d(self.a(x), 3, 3 - padding, padding, return_indices=True)
            return self.b(F.max_unpool2d(y, indices, 3, 3 - padding, padding, x.shape[2:])), indices

    model, x = Model().eval(), torch.randn(2, 5, 13, 14)
    fast = fastcv.accelerate(model)
    with torch.inference_mode():
        for _ in range(2):
            for got, wanted in zip(fast(x), model(x), strict=True):
                torch.testing.assert_close(got, wanted)
    assert len(programs(fast)) == 2


def test_layers_of_fastcv():
    """They and its operators are captured as torch's are."""

    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.linear = fastcv.nn.ConvTranspose2d(16, 8, 2, 2), fastcv.nn.Linear(32, 4)

        def forward(self, x):
            x = fastcv.ops.max_pool2d(self.up(x), 2)
            return self.linear(torch.flatten(fastcv.ops.adaptive_avg_pool2d(x, 2), 1))

    layers = fastcv.nn
    model = nn.Sequential(
        layers.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), layers.MaxPool2d(2),
        layers.ConvNormAct(layers.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU()),
        layers.Upsample(scale_factor=2), Tail(),
    ).eval()  # fmt: skip
    fast, x = fastcv.accelerate(model), torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    (program,) = programs(fast)
    assert not fast.fastcv_report.parts[0].torch_calls
    assert program.convolutions == 4


def test_local_response_norm_is_ours():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.LocalResponseNorm(5), Function(lambda x: F.local_response_norm(x, 3)))
    model[2].first = nn.Conv2d(16, 12, 1)
    fast, x = fastcv.accelerate(model.eval()), torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    (part,) = fast.fastcv_report.parts
    assert part.own_calls == ["local_response_norm"] * 2 and not part.torch_calls


def test_prelu():
    model = Function(nn.Sequential(nn.PReLU(12), nn.PReLU())).eval()
    fast = fastcv.accelerate(model)
    assert_alike(fast, model, torch.randn(2, 12, 9, 9))
    assert [s.op for s in programs(fast)[0].listing.steps] == ["conv", "prelu", "prelu", "conv"]


def test_bfloat16_rounds_operands():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 33, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(33, 72, 1, stride=2),
        nn.Conv2d(72, 40, (5, 1), dilation=2),
    ]
    model = nn.Sequential(*layers).eval()
    fast, x = fastcv.accelerate(model, dtype=torch.bfloat16), torch.randn(2, 3, 60, 50)
    with torch.inference_mode():
        expected = model(x)
        for _ in range(2):
            result = fast(x)
            assert result.dtype == torch.float32
            assert (result - expected).abs().max() <= 0.02 * expected.abs().max()
        kernels = [KERNELS[row[1]] for row in programs(fast)[0].profile(x).tolist()]
    expected = {  # tiles of the processor divide 3 and 72 channels, not 33
        "amx": ["amx", "gemm", "amx"],
        "avx512_bf16": ["gemm", "bf16", "bf16"],
        "none": ["gemm", "gemm", "gemm"],
    }
    assert kernels == expected[fastcv.build_info()["bfloat16_products"]]


def test_merge_is_one_step():
    model = Pyramid().eval()
    fast = fastcv.accelerate(model)
    assert_alike(fast, model, torch.randn(2, 3, 25, 40), torch.randn(1, 3, 30, 7))
    steps = [s.op for s in programs(fast)[0].listing.steps]
    assert steps.count("merge") == 1 and not {"add", "resize"} & set(steps)
