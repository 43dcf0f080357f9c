"""Graphs without a GPU: what records is replaced by a function that computes over static buffers."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from program_cases import programs, randomise_norms, without_gpu
from torch import nn

import fastcv
from fastcv.accelerate import _device, _graphs, _program
from fastcv.accelerate._graphs import Graphs

CPU = torch.device("cpu")


@pytest.fixture
def records(monkeypatch):
    return without_gpu(monkeypatch)


def double(x, y):
    return 2 * x, x + y.sum()


def test_sizes_are_recorded_once(records):
    graphs = Graphs(double)
    with torch.no_grad():
        for n in (3, 4, 3, 4, 3):
            x, y = torch.randn(n, 2), torch.randn(n)
            for result, expected in zip(graphs(x, y), double(x, y), strict=True):
                assert torch.equal(result, expected)
        assert records == [[(3, 2), (3,)], [(4, 2), (4,)]]
        graphs(torch.randn(2, 3).t(), torch.randn(3))  # other strides
        graphs(torch.randn(3, 2, dtype=torch.float64), torch.randn(3))
        assert len(records) == 4
    x = torch.randn(3, 2, requires_grad=True)
    graphs(x, torch.randn(3))[0].sum().backward()
    assert len(records) == 4 and x.grad.unique().tolist() == [2]


def test_results_outlive_the_next_call(records):
    graphs = Graphs(double)
    with torch.no_grad():
        first = graphs(torch.ones(2), torch.ones(2))
        second = graphs(torch.zeros(2), torch.zeros(2))
    assert first[0].tolist() == [2, 2] and second[0].tolist() == [0, 0]


def test_the_least_recently_used_is_dropped(records):
    graphs = Graphs(double, most=2)
    with torch.no_grad():
        for n in (1, 2, 1, 3, 1, 2):
            graphs(torch.ones(n), torch.ones(n))
    assert [shapes[0] for shapes in records] == [(1,), (2,), (3,), (2,)]
    assert len(graphs._kept) == 2


def test_clear_records_again(records):
    scale = [1.0]
    graphs = Graphs(lambda x: (x * scale[0],))
    with torch.no_grad():
        graphs(torch.ones(1))
        graphs.clear()
        scale[0] = 3.0
        assert graphs(torch.ones(1))[0].item() == 3
    assert len(records) == 2


def test_a_failure_leaves_nothing_behind(records, monkeypatch):
    def fail(*_):
        raise RuntimeError("it waits for the device")

    graphs = Graphs(double)
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(_graphs, "_record", fail)
            with pytest.raises(RuntimeError, match="it waits"):
                graphs(torch.ones(1), torch.ones(1))
        assert graphs(torch.ones(1), torch.ones(1))[0].item() == 2


def test_threads(records):
    graphs = Graphs(double, most=2)

    def run(n):
        x = torch.full((1 + n % 3,), float(n))
        with torch.no_grad():
            return graphs(x, x)[0].tolist()

    with ThreadPoolExecutor(4) as pool:
        for n, result in enumerate(pool.map(run, range(60))):
            assert result == [2.0 * n] * (1 + n % 3)


def test_tensors_of_the_cpu_are_computed_as_they_are():
    graphs = Graphs(double)
    with torch.inference_mode():
        assert graphs(torch.ones(1), torch.ones(1))[0].item() == 2
        assert Graphs(lambda: (torch.ones(1),))()[0].item() == 1
    assert not graphs._kept


@pytest.mark.parametrize("most", [0, -1, 1.5, None])
def test_how_many_are_kept_is_checked(most):
    with pytest.raises(ValueError, match=f"most: expected a positive int, got {most}"):
        Graphs(double, most)


@pytest.fixture
def by_graphs(records, monkeypatch):
    """Programs of the CPU are loaded as those of other devices, with graphs."""
    monkeypatch.setattr(_program.Program, "_load_on_cpu", lambda program: program._load_by_calls(CPU))
    return records


def test_programs(by_graphs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model = randomise_norms(model.eval())
    fast = fastcv.accelerate(model, graphs=True)
    with torch.inference_mode():
        for n in (6, 9, 6, 9):
            x = torch.randn(2, 3, n, 7)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
        assert len(by_graphs) == 2
        model[0].weight.mul_(2)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
        assert len(by_graphs) == 3
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(by_graphs) == 3
    (program,) = programs(fast)
    assert type(program._latest[0]) is _program._Replayed
    with torch.inference_mode():
        fast(torch.randn(1, 3, 5, 5)), fast(torch.randn(1, 3, 6, 5))
    x = torch.randn(2, 3, 6, 7, requires_grad=True)
    fast(x).sum().backward()  # as before
    assert x.grad is not None and len(by_graphs) == 5


def test_programs_without_graphs(by_graphs):
    fast, x = fastcv.accelerate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), torch.randn(1, 3, 6, 6)
    with torch.inference_mode():
        fast(x)
    assert type(programs(fast)[0]._latest[0]) is _device.OnDevice and not by_graphs
