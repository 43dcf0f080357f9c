"""Linear against torch's: results, modes, state dict, what is laid out, where torch's runs."""

import copy
import gc
import pickle

import pytest
import torch
from layer_cases import pair, train_a_step
from torch import nn

import fastcv
from fastcv._library import implementation
from fastcv.ops._layouts import kept
from fastcv.reference.conv2d import ACTIVATIONS

compiled_only = pytest.mark.skipif(implementation("conv2d", "cpu") != "compiled", reason="of the compiled kernels")


def error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def in_double(layer, x):
    bias = None if layer.bias is None else layer.bias.double()
    return nn.functional.linear(x.double(), layer.weight.double(), bias)


@pytest.fixture
def used(monkeypatch):
    """The kernels that layers ran on."""
    kernels, operator = [], torch.ops.fastcv.conv2d

    class Spy:
        @staticmethod
        def default(*args):
            kernels.append(args[-1])
            return operator.default(*args)

    monkeypatch.setattr(torch.ops.fastcv, "conv2d", Spy)
    return kernels


def test_by_hand():
    layer = fastcv.nn.Linear(1024, 1024)
    with torch.no_grad():
        layer.weight.zero_().fill_diagonal_(2)
        layer.bias.fill_(-6)
        for rows in (1, 6):
            x = torch.arange(1024.0).repeat(rows, 1)
            assert torch.equal(layer(x), 2 * x - 6)
            assert layer(x, activation="relu")[0, :6].tolist() == [0, 0, 0, 0, 2, 4]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(2048, 1000), (1031, 1021), (20, 60_000), (64, 10)])
def test_linear(size, bias):
    mine, theirs = pair("Linear", *size, bias=bias)
    assert repr(mine) == repr(theirs) and list(mine.state_dict()) == list(theirs.state_dict())
    for shape in ((), (1,), (2,), (3,), (4,), (5,), (33,), (2, 3), (2, 1, 2), (0,), (3, 0)):
        x = torch.randn(*shape, size[0])
        with torch.inference_mode():
            actual = mine(x)
            assert actual.shape == theirs(x).shape and actual.is_contiguous()
            if x.numel():
                assert error(actual, in_double(theirs, x)) < 1e-5


@compiled_only
def test_where_it_runs(used):
    layer = fastcv.nn.Linear(1024, 1100)
    with torch.no_grad():
        for rows in (1, 2, 4, 5):  # one vector stays with torch here
            layer(torch.randn(rows, 1024))
        fastcv.nn.Linear(1024, 4096)(torch.randn(1024))
        assert used == ["gemv", "gemv", "gemm", "gemv"]
        used.clear()
        fastcv.nn.Linear(512, 1000)(torch.randn(3, 512))  # too small
        copy.deepcopy(layer).double()(torch.randn(3, 1024).double())
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(3, 1024)).dtype == torch.bfloat16
    layer(torch.randn(3, 1024))  # with gradients
    torch.func.vmap(layer)(torch.randn(3, 1024))
    assert used == []


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    mine, theirs = pair("Linear", 1024, 1030)
    for rows in (2, 7):
        x = torch.randn(rows, 1024)
        expected = ACTIVATIONS[activation](in_double(theirs, x), 0.01)
        with torch.inference_mode():
            assert error(mine(x, activation=activation), expected) < 1e-5
        assert error(mine(x, activation=activation), expected) < 1e-5


@pytest.mark.parametrize("rows", [2, 9])
def test_strided_input_nan_and_threads(rows):
    mine, theirs = pair("Linear", 1024, 1030)
    wide = torch.randn(rows, 2 * 1024)
    threads, results = torch.get_num_threads(), []
    with torch.inference_mode():
        for x in (wide[:, ::2], wide[:, 5 : 5 + 1024], torch.randn(1024, rows).t()):
            assert error(mine(x), in_double(theirs, x)) < 1e-5
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(mine(wide[:, :1024]))
        torch.set_num_threads(threads)
        wide[1, 3] = float("nan")
        assert mine(wide[:, :1024]).isnan().any(1).tolist() == [r == 1 for r in range(rows)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_gradients_and_a_training_step():
    mine, theirs = pair("Linear", 1024, 1030)
    train_a_step(mine, theirs, torch.randn(6, 1024))


@compiled_only
def test_what_is_laid_out_is_kept_and_forgotten_with_the_layer():
    gc.collect()
    before = len(kept)
    layer = fastcv.nn.Linear(1024, 1030)
    with torch.no_grad():
        layer(torch.randn(2, 1024))
        assert len(kept) == before  # few vectors need no copy
        layer(torch.randn(8, 1024))
        first = kept[id(layer.weight)].layouts
        layer(torch.randn(9, 1024))
        assert kept[id(layer.weight)].layouts is first
    size = len(pickle.dumps(layer))
    assert size < 1.1 * 4 * layer.weight.numel()
    del layer
    gc.collect()
    assert len(kept) == before


def test_compile():
    mine, theirs = pair("Linear", 1024, 1030)
    x = torch.randn(3, 1024)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert error(compiled(x, activation="relu"), in_double(theirs, x).relu()) < 1e-5


def test_accelerate():
    mine, theirs = pair("Linear", 1024, 1030)
    x = torch.randn(3, 1024)
    with torch.inference_mode():
        assert error(fastcv.accelerate(nn.Sequential(mine, nn.ReLU()).eval())(x), in_double(theirs, x).relu()) < 1e-5


def test_errors():
    layer = fastcv.nn.Linear(1024, 1030)
    with torch.inference_mode():
        with pytest.raises(ValueError, match=r"activation: expected .* got 'softsign'"):
            layer(torch.ones(1024), activation="softsign")
        with pytest.raises(RuntimeError, match="1023"):
            layer(torch.ones(2, 1023))
