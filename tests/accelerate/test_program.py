"""Programs: every step against torch's layers, sizes that change, memory, threads, and numbers that make no program."""

import gc
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastcv
from fastcv.accelerate._compile import backend
from fastcv.accelerate._table import program_table

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
    "tanh": lambda x: torch.tanh(x * x.tanh()),
    "norm": nn.Sequential(nn.BatchNorm2d(12), nn.ReLU()),
    "written_in_place": lambda x: x.relu_() + x,
}  # fmt: skip


def assert_alike(fast, model, *inputs, tolerance=2e-5):
    """Twice each: the first call with a size plans for it."""
    with torch.inference_mode():
        for x in inputs:
            for _ in range(2):
                torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=tolerance)


def randomise_norms(model):
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return model


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


def programs(fast):
    return [p for part in fast.fastcv_report.parts for p in part.programs]


def test_layers_between_programs_stay_with_torch():
    model = Function(lambda x: torch.cumsum(x, 2) * x.sigmoid()).eval()
    fast = fastcv.accelerate(model)
    assert_alike(fast, model, torch.randn(2, 12, 5, 6))
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
    assert_alike(fast, model, *(torch.randn(n, 20, 11, 8) for n in (2, 1, 5)), tolerance=1e-4)
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
    pieces = (
        whole[:, :12],
        whole[:, 3:15, 2:, ::2],
        whole[:, :12].contiguous()[:, :, 1:],
        whole[:1, :12].expand(3, -1, -1, -1),
    )
    assert_alike(fast, model, *pieces)


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
        assert_alike(fast, model, x, x)
    finally:
        torch.set_num_threads(before)


def test_programs_are_freed():
    fast, x = fastcv.accelerate(Function(nn.ReLU())), torch.randn(1, 12, 4, 4)
    with torch.inference_mode():
        fast(x), fast(x)
    handle = programs(fast)[0]._latest[0].handle
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
    fast = fastcv.accelerate(randomise_norms(model))
    x = torch.randn(5, 20, 1, 1)
    assert_alike(fast, model, x[:2], x, x[:1])
    (program,) = programs(fast)
    assert len(program.listing.steps) == program.convolutions == 3
    assert "transposed 4x4/2" in program_table(program, x)


class Unpooled(nn.Module):
    """As in SegNet: an encoder's pooling, undone in the decoder."""

    def __init__(self, channels=24, kernel=2, output_size=None, **options):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(5, channels, 3, padding=1), nn.Conv2d(channels, channels, 1), nn.Tanh()
        self.pool = fastcv.nn.MaxPool2d(kernel, return_indices=True, **options)
        self.unpool, self.d = nn.MaxUnpool2d(kernel), nn.Conv2d(channels, 4, 1)
        if "indices" in options:
            self.unpool = fastcv.nn.MaxUnpool2d(kernel)
        self.output_size = output_size

    def forward(self, x):
        y = F.relu(self.a(x))
        size = y.size() if self.output_size == "like" else self.output_size
        pooled, indices = self.pool(y)
        return self.d(self.unpool(self.c(self.b(pooled)), indices, output_size=size))


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [(16, 20), (12, 8)]),
        ({"channels": 7}, [(16, 20), (12, 8)]),
        ({"kernel": (2, 3), "output_size": "like"}, [(17, 23), (16, 24), (4, 3)]),
        ({"kernel": 3, "output_size": "like", "ceil_mode": True}, [(17, 23), (9, 9)]),
        ({"output_size": (16, 21)}, [(16, 21)]),
        ({"indices": "compact"}, [(17, 23), (8, 8)]),
    ],
)
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


def test_data_that_is_assigned():
    """Twice, so that the second may come to lie where the first was."""
    model = nn.Sequential(nn.Conv2d(8, 64, 3)).eval()
    fast, x = fastcv.accelerate(model), torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        for _ in range(5):
            fast(x)
            for _ in range(2):
                model[0].weight.data = model[0].weight.data * 1.5
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


def test_threads_while_weights_change():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    fast, x, errors = fastcv.accelerate(model), torch.ones(1, 3, 12, 12), []
    with torch.inference_mode():
        fast(x)

    def read():
        try:
            with torch.no_grad():
                for _ in range(300):
                    fast(x)
        except RuntimeError as error:
            errors.append(error)

    readers = [Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    while any(reader.is_alive() for reader in readers):
        with torch.no_grad():
            model[0].weight.mul_(1.0)
    assert not errors
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


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
    fast = fastcv.accelerate(model)
    assert_alike(fast, model, torch.randn(2, 12, 9, 9))
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
