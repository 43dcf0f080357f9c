"""The demo: what it times, checks and draws, on a smaller picture of the same photograph."""

import numpy as np
import pytest
import torch

import fastcv
from fastcv.demo import __main__ as demo
from fastcv.demo import detector, stopwatch


def test_stopwatch_watches_and_restores():
    import math

    original = math.sqrt

    def pipeline():
        return math.sqrt(4.0) + math.sqrt(9.0)

    run = stopwatch.time_once(pipeline, [(math, "sqrt")])
    assert run.result == 5.0
    assert run.calls == {"sqrt": 2}
    assert 0 < run.seconds["sqrt"] < run.total
    assert math.sqrt is original


def test_comparison_table():
    def run(total, part):
        return stopwatch.Run(total=total, seconds={"nms": part}, calls={"nms": 3})

    plain = [run(0.100, 0.020), run(0.120, 0.040), run(0.110, 0.030)]
    patched = [run(0.085, 0.005), run(0.090, 0.010), run(0.220, 0.020)]
    fast = [stopwatch.Run(total=0.05)] * 3
    ways = {"as it is": plain, "patched": patched, "accelerated": fast}
    lines = stopwatch.Comparison(ways).table().splitlines()
    assert lines[1].split() == ["nms", "(3", "calls)", "30.0", "ms", "10.0", "ms", "3.00x"]
    assert lines[2].split() == ["the", "rest", "80.0", "ms", "80.0", "ms", "50.0", "ms", "1.60x"]
    assert lines[3].split() == ["in", "all", "110.0", "ms", "90.0", "ms", "50.0", "ms", "2.20x"]


def test_comparison_takes_turns():
    pytest.importorskip("torchvision")
    states = []

    def note():
        states.append("torchvision" in fastcv.build_info()["patched"])

    comparison = stopwatch.compare(note, lambda: states.append(7), [], rounds=2)
    assert states == [False, True, 7] * 3  # the first three to warm up
    assert [len(runs) for runs in comparison.runs.values()] == [2, 2, 2]


def test_same_detections():
    found = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 20]]),
        "scores": torch.tensor([0.9, 0.8]),
        "labels": torch.tensor([1, 2]),
    }
    swapped = {key: value.flip(0) for key, value in found.items()}
    detector.same_detections(swapped, found)
    for key, other in (("boxes", 1.0), ("scores", 0.1), ("labels", 1)):
        changed = {**found, key: found[key] + torch.tensor(other, dtype=found[key].dtype)}
        with pytest.raises(AssertionError, match="no like"):
            detector.same_detections(changed, found)
    fewer = {key: value[:1] for key, value in found.items()}
    with pytest.raises(AssertionError, match="different numbers"):
        detector.same_detections(fewer, found)


def test_whole_demo(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchvision")
    pytest.importorskip("facenet_pytorch")
    pytest.importorskip("skimage")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(detector, "SIZE", 160)
    output = tmp_path / "folder" / "astronaut.png"
    assert demo.main(["--rounds", "1", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "the same 1 faces in all ways" in printed
    assert "the same 100 detections in all ways" in printed
    assert "batched_nms (12 calls)" in printed
    assert "multiscale_roi_align (1 calls)" in printed
    drawn = np.array(image.open(output))
    red = (drawn == [255, 0, 0]).all(2)
    assert drawn.shape == (512, 512, 3)
    assert 300 < red.sum() < 4000  # the sides of one box, and its score
    assert fastcv.build_info()["patched"] == {}


def test_missing_packages(monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    assert demo.main([]) == 1
    assert "pip install --no-deps facenet-pytorch" in capsys.readouterr().err
