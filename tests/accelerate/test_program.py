"""Programs: sizes that change, memory, threads, changes of weights, and numbers that make no program."""

import gc
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from program_cases import Block, Function, assert_alike, programs
from torch import nn

import fastcv
from fastcv.accelerate._compile import backend
from fastcv.accelerate._table import program_table

if fastcv.build_info()["operators"]["conv2d"]["cpu"] != "compiled":
    pytest.skip("the compiled part is not built", allow_module_level=True)


def test_layers_between_programs_stay_with_torch():
    model = Function(lambda x: torch.cumsum(x, 2) * x.sigmoid()).eval()
    fast = fastcv.accelerate(model)
    assert_alike(fast, model, torch.randn(2, 12, 5, 6))
    assert len(programs(fast)) == 2 and fast.fastcv_report.parts[0].torch_calls[:1] == ["cumsum"]


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
    return torch.ops.fastcv.program_load(list(code), list(weights), 0, False)


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
