"""Programs: every step against torch's layers, sizes that change, memory, threads, and numbers that make no program."""

import gc
import json
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastcv
from fastcv.accelerate._compile import backend
from fastcv.accelerate._table import program_table
from fastcv.ops.conv2d import KERNELS

if fastcv.build_info()["operators"]["conv2d"]["cpu"] != "compiled":
    pytest.skip("the compiled part is not built", allow_module_level=True)


class Function(nn.Module):
    """A function after a convolution, and one before another, so that it lies inside a program."""

    def __init__(self, function, channels=12, out=12):
        super().__init__()
        self.first = nn.Conv2d(channels, 12, 1)
        self.last = nn.Conv2d(out, 5, 1) if out else nn.Identity()
        self.function = function
        if isinstance(function, nn.Module):
            self.layer = function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


class Skip(nn.Sequential):
    def forward(self, x):
        return F.relu(x + super().forward(x))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 12, 3, 2, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return F.conv_transpose2d(x, self.weight, None, 2, padding=1, dilation=(2, 1))


STEPS = {
    "transposed": nn.ConvTranspose2d(12, 12, 2, 2),
    "transposed_norm": nn.Sequential(
        nn.ConvTranspose2d(12, 12, (4, 3), 2, 1, (0, 1), 1, False), nn.BatchNorm2d(12), nn.ReLU()
    ),
    "transposed_groups": nn.Sequential(
        nn.ConvTranspose2d(12, 40, 3, 1, 1), nn.ConvTranspose2d(40, 32, 4, 2, 1, groups=2), nn.Conv2d(32, 12, 1)
    ),
    "transposed_depthwise": nn.Sequential(nn.ConvTranspose2d(12, 12, 4, 2, 1, groups=12), nn.BatchNorm2d(12)),
    "transposed_winograd": nn.Sequential(
        nn.ConvTranspose2d(12, 40, 4, 2, 1), nn.ConvTranspose2d(40, 40, 4, 2, 1), nn.SiLU(), nn.Conv2d(40, 12, 1)
    ),
    "transposed_add": nn.Sequential(
        Skip(nn.ConvTranspose2d(12, 12, 3, 1, 1)), Skip(nn.ConvTranspose2d(12, 12, 5, 1, 2))
    ),
    "transposed_function": Functional(),
    "max_pool": nn.MaxPool2d(3, 2, 1),
    "max_pool_ceil": nn.MaxPool2d(2, 2, ceil_mode=True),
    "max_pool_dilated": nn.MaxPool2d((3, 2), (1, 2), (1, 0), dilation=2),
    "max_pool_function": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "max_pool_large": nn.MaxPool2d(9, 1, 4),
    "avg_pool": nn.AvgPool2d(3, 2, 1),
    "avg_pool_exclusive": nn.AvgPool2d(3, 2, 1, count_include_pad=False, ceil_mode=True),
    "avg_pool_function": lambda x: F.avg_pool2d(x, kernel_size=3, stride=1, padding=1),
    "adaptive": nn.AdaptiveAvgPool2d((3, 4)),
    "adaptive_larger": nn.AdaptiveAvgPool2d((30, None)),
    "adaptive_function": lambda x: F.adaptive_avg_pool2d(x, 1),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "add": lambda x: x + x.sigmoid(),
    "mul": lambda x: x * x.sigmoid(),
    "gate": lambda x: F.adaptive_avg_pool2d(x, 1).sigmoid() * x,
    "gate_add": lambda x: x + F.adaptive_avg_pool2d(x, 1),
    "cat": lambda x: torch.cat([x, x.relu()], 1)[:, :12],
    "cat_twice": lambda x: torch.cat([x, F.relu(x), x], 1).chunk(3, 1)[1],
    "cat_prefixes": lambda x: torch.cat([x, F.silu(x)], 1).relu().chunk(2, 1)[0]
    + torch.cat([x, F.silu(x), x * x], 1).chunk(3, 1)[2],
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "nearest_size": lambda x: F.interpolate(x, size=(7, 31)),
    "bilinear": lambda x: F.interpolate(x, scale_factor=(1.5, 0.7), mode="bilinear"),
    "bilinear_corners": nn.Upsample((20, 9), mode="bilinear", align_corners=True),
    "like": lambda x: F.interpolate(F.max_pool2d(x, 2), size=x.shape[-2:], mode="bilinear") + x,
    "activations": lambda x: F.gelu(F.hardswish(F.leaky_relu(x, 0.3))),
    "norm": nn.Sequential(nn.BatchNorm2d(12), nn.ReLU()),
    "written_in_place": lambda x: x.relu_() + x,
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_steps(name, channels_last):
    torch.manual_seed(0)
    model = Function(STEPS[name]).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    fast = fastcv.accelerate(model)
    for size in ((2, 12, 17, 13), (1, 12, 40, 33), (3, 12, 9, 9), (2, 12, 17, 13)):
        x = torch.randn(size)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        with torch.inference_mode():
            for _ in range(2):
                torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=2e-5)
    assert len(fast.fastcv_report.parts) == 1 and not fast.fastcv_report.left


def programs(fast):
    return [p for part in fast.fastcv_report.parts for p in part.programs]


def test_layers_between_programs_stay_with_torch():
    model = Function(lambda x: torch.cumsum(x, 2) * x.sigmoid()).eval()
    fast, x = fastcv.accelerate(model), torch.randn(2, 12, 5, 6)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x))
    assert len(programs(fast)) == 2 and fast.fastcv_report.parts[0].torch_calls[:1] == ["cumsum"]


class Block(nn.Module):
    """As in ConvNeXt."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.wide, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)
        y = self.scale * y
        y += x
        return y


def test_layer_norm_and_linear_layers():
    torch.manual_seed(0)
    model = nn.Sequential(
        Block(20), Block(20), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(80, 7), nn.ReLU()
    ).eval()
    fast = fastcv.accelerate(model)
    with torch.inference_mode():
        for n in (2, 1, 5):
            x = torch.randn(n, 20, 11, 8)
            for _ in range(2):
                torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-4)
    assert [s.op for s in programs(fast)[0].listing.steps].count("conv") == 7  # scale and addition are taken up
    assert len(programs(fast)[0].listing.steps) == 11


def test_values_that_are_returned_and_used():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            y = self.a(x)
            z = torch.cat([y, self.b(y)], 1)
            return x, y, z, z.chunk(2, 1)[1], z, F.relu(y)

    model = Model().eval()
    fast, x = fastcv.accelerate(model), torch.randn(2, 4, 6, 5)
    with torch.inference_mode():
        for _ in range(2):
            for got, wanted in zip(fast(x), model(x), strict=True):
                torch.testing.assert_close(got, wanted)


def test_inputs_may_be_pieces_of_others():
    model = Function(nn.ReLU()).eval()
    fast = fastcv.accelerate(model)
    whole = torch.randn(2, 20, 9, 9).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        for x in (
            whole[:, :12],
            whole[:, 3:15, 2:, ::2],
            whole[:, :12].contiguous()[:, :, 1:],
            whole[:1, :12].expand(3, -1, -1, -1),
        ):
            for _ in range(2):
                torch.testing.assert_close(fast(x), model(x))


def test_empty_batches():
    model = Function(nn.MaxPool2d(2)).eval()
    fast = fastcv.accelerate(model)
    with torch.inference_mode():
        fast(torch.randn(1, 12, 8, 8))
        assert fast(torch.randn(0, 12, 8, 8)).shape == (0, 5, 4, 4)


def test_sizes_that_do_not_fit():
    fast = fastcv.accelerate(nn.Sequential(nn.Conv2d(3, 4, 5), nn.MaxPool2d(3)).eval())
    with torch.inference_mode():
        fast(torch.randn(1, 3, 12, 12))
        with pytest.raises(RuntimeError, match="smaller than the kernel"):
            fast(torch.randn(1, 3, 4, 12))
        with pytest.raises(RuntimeError, match="3 channels"):
            fast(torch.randn(1, 2, 12, 12))


def test_threads_share_a_program():
    model = Function(nn.MaxPool2d(3, 2, 1)).eval()
    fast = fastcv.accelerate(model)
    images = [torch.randn(1, 12, 10 + i % 5, 20) for i in range(40)]
    with torch.inference_mode():
        expected = [model(x) for x in images]
        fast(images[0])

    def run(x):
        with torch.inference_mode():
            return fast(x)

    with ThreadPoolExecutor(6) as pool:
        for got, wanted in zip(pool.map(run, images), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    before, model = torch.get_num_threads(), Function(nn.MaxPool2d(3, 2, 1)).eval()
    fast, x = fastcv.accelerate(model), torch.randn(2, 12, 60, 50)
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            for _ in range(3):
                torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_programs_are_freed():
    fast, x = fastcv.accelerate(Function(nn.ReLU())), torch.randn(1, 12, 4, 4)
    with torch.inference_mode():
        fast(x), fast(x)
    handle = programs(fast)[0]._handle
    del fast
    gc.collect()
    with pytest.raises(RuntimeError, match="is not a program"):
        torch.ops.fastcv.program_run(handle, [x])


def load(*code, weights=()):
    return torch.ops.fastcv.program_load(list(code), list(weights), 0)


def test_numbers_that_make_no_program():
    with pytest.raises(RuntimeError, match="ends early"):
        load(1, 4)
    with pytest.raises(RuntimeError, match="kind 99"):
        load(1, 4, 2, 1, 1, 1, 4, 1, 99, 1, 1, 0, 0, 0)
    with pytest.raises(RuntimeError, match="read before it is computed"):
        load(1, 4, 2, 1, 1, 1, 4, 1, 6, 1, 1, 1, 2, 1, 0, 0)
    with pytest.raises(RuntimeError, match="other inputs, params or weights"):
        load(1, 4, 2, 1, 1, 1, 4, 1, 6, 1, 1, 0, 1, 1, 0)
    with pytest.raises(RuntimeError, match="numbers after the end"):
        load(1, 4, 2, 1, 1, 1, 4, 1, 6, 1, 1, 0, 2, 1, 0, 0, 5)
    with pytest.raises(RuntimeError, match="expected float32"):
        load(1, 4, weights=[torch.ones(3, dtype=torch.float64)])
    handle = load(1, 4, 2, 1, 1, 1, 4, 1, 6, 1, 1, 0, 2, 1, 0, 0)
    x = torch.randn(1, 3, 4, 5)
    torch.testing.assert_close(torch.ops.fastcv.program_run(handle, [x])[0], x.relu())
    with pytest.raises(RuntimeError, match="expected 1, got 2"):
        torch.ops.fastcv.program_run(handle, [x, x])
    with pytest.raises(RuntimeError, match="expected float32 of 4 dimensions"):
        torch.ops.fastcv.program_run(handle, [x[0]])
    torch.ops.fastcv.program_free(handle)


def test_generator_of_one_pixel():
    """As in DCGAN: the first layer's input is a vector, and every norm goes into the weights before it."""
    torch.manual_seed(0)
    layers = []
    for c, k, stride, padding in ((20, 48, 1, 0), (48, 32, 2, 1)):
        layers += [nn.ConvTranspose2d(c, k, 4, stride, padding, bias=False), nn.BatchNorm2d(k), nn.ReLU(True)]
    model = nn.Sequential(*layers, nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Sigmoid()).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    fast = fastcv.accelerate(model)
    with torch.inference_mode():
        for n in (2, 5, 1):
            x = torch.randn(n, 20, 1, 1)
            for _ in range(2):
                torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=2e-5)
    (program,) = programs(fast)
    assert len(program.listing.steps) == program.convolutions == 3
    assert "transposed 4x4/2" in program_table(program, x)


def test_profile_names_every_step():
    model = Function(nn.MaxPool2d(3, 2, 1)).eval()
    fast, x = fastcv.accelerate(model), torch.randn(2, 12, 60, 50)
    with torch.inference_mode():
        fast(x)
        table = programs(fast)[0].profile(x)
    assert table[:, 0].tolist() == [0, 1, 0] and (table[:, 2] > 0).all()
    assert table[0, 3] == 2 * 60 * 50 * 12 * 12


def test_compiled_by_torch():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), Block(8)
    ).eval()
    fast = torch.compile(model, backend=backend)
    with torch.no_grad():
        for size in ((2, 3, 20, 17), (1, 3, 31, 40), (3, 3, 24, 24)):
            x = torch.randn(size)
            for _ in range(2):
                torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=2e-5)
        model[0].weight.mul_(2)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=2e-5)
    x = torch.randn(1, 3, 20, 20, requires_grad=True)
    fast(x).sum().backward()
    assert x.grad is not None


def test_the_backend_is_found_by_its_name():
    names = {point.name for point in entry_points(group="torch_dynamo_backends")}
    if "fastcv" not in names:
        pytest.skip("fastcv is not installed in this environment: it has no entry points")
    assert "fastcv" in torch._dynamo.list_backends()


def test_programs_are_printed():
    model = Function(nn.MaxPool2d(3, 2, 1)).eval()
    fast, x = fastcv.accelerate(model), torch.randn(2, 12, 60, 50)
    with torch.inference_mode():
        fast(x)
        lines = program_table(programs(fast)[0], x).splitlines()
    assert [line.split()[0] for line in lines] == ["step", "conv", "max_pool", "conv", "in"]
    assert lines[1].split()[1:5] == ["1x1", "gemm", "2x12x60x50", "2x12x60x50"]


def test_prelu():
    model = Function(nn.Sequential(nn.PReLU(12), nn.PReLU())).eval()
    fast, x = fastcv.accelerate(model), torch.randn(2, 12, 9, 9)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert [s.op for s in programs(fast)[0].listing.steps] == ["conv", "prelu", "prelu", "conv"]


def test_bfloat16_rounds_operands():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 33, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(33, 70, 1, stride=2),
        nn.Conv2d(70, 40, (5, 1), dilation=2),
    ]
    model = nn.Sequential(*layers).eval()
    fast, x = fastcv.accelerate(model, dtype=torch.bfloat16), torch.randn(2, 3, 60, 50)
    with torch.inference_mode():
        expected = model(x)
        for _ in range(2):
            result = fast(x)
            assert result.dtype == torch.float32
            assert (result - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize(
    ("size", "pixels", "expected"),
    [
        (3, 114, {"default": "winograd", "highest": "gemm", "fast": "winograd_6x6"}),
        (3, 14, {"default": "winograd", "highest": "gemm", "fast": "winograd"}),
        (5, 40, {"default": "winograd_5x5", "highest": "gemm", "fast": "winograd_5x5_4x4"}),
    ],
)
def test_precision_chooses_winograds_tiles(size, pixels, expected):
    model = nn.Sequential(nn.Conv2d(32, 32, size, padding=size // 2)).eval()
    x = torch.randn(1, 32, pixels, pixels)
    kernels = {}
    for precision in ("default", "highest", "fast"):
        fast = fastcv.accelerate(model, precision=precision)
        with torch.inference_mode():
            exact = F.conv2d(x.double(), model[0].weight.double(), model[0].bias.double(), padding=size // 2)
            assert (fast(x) - exact).abs().max() <= (5e-5 if precision == "fast" else 1e-5) * exact.abs().max()
            kernels[precision] = KERNELS[programs(fast)[0].profile(x)[0, 1]]
    assert kernels == expected


def test_wrong_precision_and_type():
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    for precision in ("highest", "fast"):
        with pytest.raises(ValueError, match='expected "default", or in float32 "highest" or "fast"'):
            fastcv.accelerate(model, dtype=torch.bfloat16, precision=precision)
    with pytest.raises(ValueError, match=r"precision: expected .* got 'faster'"):
        fastcv.accelerate(model, precision="faster")
    with pytest.raises(ValueError, match=r"expected torch.float32 or torch.bfloat16, got torch.float16"):
        fastcv.accelerate(model, dtype=torch.float16)


def test_tuning(tmp_path):
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 40, 1)).eval()
    fast, x = fastcv.accelerate(model), torch.randn(1, 16, 30, 31)
    with torch.inference_mode():
        expected = model(x)
    for choice in fastcv.tune(fast, x, file=tmp_path / "choices.json", rounds=2):
        assert choice["times_as_fast"] > 1
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)
    shape = {"input": [1, 16, 30, 31], "weight": [16, 16, 3, 3], "groups": 1}
    shape |= {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    file = tmp_path / "other.json"

    def kernel_after(name):
        file.write_text(json.dumps([{**shape, "kernel": name}]))
        fastcv.load_tuning(file)
        with torch.inference_mode():
            fast = fastcv.accelerate(model)
            fast(x)
            torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)
            return KERNELS[programs(fast)[0].profile(x)[0, 1]]

    assert kernel_after("winograd_2x2") == "winograd_2x2"
    assert kernel_after("gemm") == "gemm"
    assert kernel_after("auto") == "winograd"
    weight = torch.randn(16, 16, 3, 3)
    good = {**shape, "kernel": "gemm"}
    before = fastcv.ops.conv2d(x, weight, padding=1)
    for bad, message in (
        ({}, "expected a list, got dict"),
        ("x", "expected a list, got str"),
        ([1], "choice 0: expected a dictionary, got 1"),
        ([good, {}], "choice 1: input: expected 4 ints"),
        ([good, {**good, "kernel": "bf16"}], "choice 1: kernel: expected one of gemm, .* got 'bf16'"),
        ([good, {**good, "kernel": "winograd_6x6"}], "choice 1: kernel: .* got 'winograd_6x6'"),
        ([good, {**good, "kernel": ["gemm"]}], "choice 1: kernel: "),
        ([good, {**good, "stride": [1]}], "choice 1: stride: expected 2 ints"),
        ([good, {**good, "groups": -1}], "choice 1: groups: expected an int"),
        ([good, {**good, "padding": [True, 1]}], "choice 1: padding: expected 2 ints"),
        ([good, {**good, "dilation": [1, 2**62]}], "choice 1: dilation: expected 2 ints"),
        ([good, {**good, "groups": 5}], "weight: expected"),
        ([good, {**good, "kernel": "depthwise"}], "does not serve"),
    ):
        file.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=rf"does not hold choices of fastcv\.tune \(.*{message}"):
            fastcv.load_tuning(file)
        assert torch.equal(fastcv.ops.conv2d(x, weight, padding=1), before)  # nothing of it is used
    file.write_text(json.dumps([good]))
    fastcv.load_tuning(file)
    file.write_text(json.dumps([{**good, "kernel": "winograd"}, {**good, "kernel": "depthwise"}]))
    with pytest.raises(ValueError, match="does not serve"):
        fastcv.load_tuning(file)
    assert torch.equal(fastcv.ops.conv2d(x, weight, padding=1), fastcv.ops.conv2d(x, weight, padding=1, kernel="gemm"))
    assert kernel_after("auto") == "winograd"
    file.write_text("nothing")
    with pytest.raises(ValueError, match="is not JSON"):
        fastcv.load_tuning(file)
    with pytest.raises(TypeError, match=r"expected what fastcv\.accelerate returned, got Sequential"):
        fastcv.tune(model, x)
