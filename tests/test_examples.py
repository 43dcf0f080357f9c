"""The programs under examples/ do what they say, on small pictures."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("skimage")
Image = pytest.importorskip("PIL.Image")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DATA = Path(os.environ.get("FASTCV_DATA", ""))  # a folder with real weights


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_style_transfer(tmp_path, capsys):
    example, file = load("style_transfer"), tmp_path / "out" / "picture.png"
    example.main(["--size", "64", "--steps", "8", "--output", str(file)])
    left = [
        float(line.split("style ")[1].split()[0]) for line in capsys.readouterr().out.splitlines() if "step  " in line
    ]
    assert left[0] == 1 and left[-1] < 0.8
    assert Image.open(file).size == (64, 64)
    assert [f.name for f in file.parent.iterdir()] == ["picture.png"]


def test_the_two_style_losses_agree():
    example = load("style_transfer")
    torch.manual_seed(0)
    features = [torch.randn(1, c, 9, 7, requires_grad=True) for c in (16, 32)]
    targets = [torch.randn(1, c, c) for c in (16, 32)]
    losses = [loss(features, targets) for loss in (example.plain_style_loss, example.fused_style_loss)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, features) for loss in losses))


def test_style_transfer_with_trained_weights(tmp_path):
    weights = sorted(DATA.glob("vgg19_small16x/wct_se_16x_new/*.pth")) if DATA.name else []
    if not weights:
        pytest.skip("FASTCV_DATA names no folder with vgg19_small16x")
    example = load("style_transfer")
    encoder = example.Encoder()
    encoder.load(weights[0])
    features = encoder(torch.rand(1, 3, 32, 32))
    assert features["conv41"].shape == (1, 128, 4, 4) and float(features["conv41"].max()) > 0


def test_segnet_indices(capsys):
    load("segnet_indices").main(["--size", "64", "32", "--rounds", "1"])
    said = capsys.readouterr().out
    assert "the same scores; 0.5 MB of int64 indices, 0.1 MB of compact ones" in said
    with pytest.raises(SystemExit):
        load("segnet_indices").main(["--size", "60", "32"])
    assert "expected multiples of 32, got 60 x 32" in capsys.readouterr().err
