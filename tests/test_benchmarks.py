"""The harness of the benchmarks: it refuses contenders that disagree, and shows losses."""

import json
import time

import pytest
import torch

pytest.importorskip("torchvision")

from benchmarks import harness, report, shapes
from benchmarks.__main__ import find_cases, main


def case(ours, theirs, **options):
    contenders = {"fastcv": harness.forward(ours), "torch": harness.forward(theirs)}
    return harness.Case("square", "3 floats", lambda: (torch.arange(3.0),), contenders, **options)


def test_contenders_must_agree():
    case(lambda x: x * x, torch.square).prepare()
    with pytest.raises(AssertionError, match="square: 3 floats: fastcv disagrees"):
        case(lambda x: x * x + 1, torch.square).prepare()
    with pytest.raises(AssertionError, match="fastcv disagrees"):
        case(lambda x: x * x + 1e-3, torch.square, tolerance=1e-5).prepare()


def test_backward_times_the_gradients():
    x = torch.arange(3.0, requires_grad=True)
    thunk = harness.backward(torch.square)(x)
    assert thunk()[0].tolist() == [0, 2, 4]
    assert thunk()[0].tolist() == [0, 2, 4]


def test_measured_times():
    times = harness.measure({"slow": lambda: time.sleep(0.01), "fast": lambda: None}, budget=0.1, least_rounds=5)
    assert list(times) == ["slow", "fast"]
    assert 0.009 < times["slow"].p20 <= times["slow"].median <= times["slow"].p80
    assert times["fast"].median < 1e-4
    assert times["slow"].rounds == times["fast"].rounds >= 5


def result(shape, ours, theirs):
    times = {
        "fastcv": harness.Times(ours, ours, ours, 7),
        "torchvision": harness.Times(theirs, theirs, theirs, 7),
    }
    return harness.Result("nms", shape, times)


def test_report_shows_losses(tmp_path):
    results = [result("wins", 1e-3, 20e-3), result("loses", 4e-6, 1e-6)]
    environment = harness.environment()
    report.save_table(tmp_path / "cpu.md", results, environment)
    report.save_json(tmp_path / "cpu.json", results, environment)
    report.save_chart(tmp_path / "cpu.png", results, environment)
    table = (tmp_path / "cpu.md").read_text()
    assert "| wins | 1 ms (1 ms to 1 ms) | torchvision | 20 ms (20 ms to 20 ms) | **20x** |" in table
    assert "| 0.25x, slower |" in table
    for fact in ("processor", "torch", "torchvision", "cpu_isa", "date"):
        assert str(environment[fact]) in table
    content = json.loads((tmp_path / "cpu.json").read_text())
    assert [row["ratio"] for row in content["results"]] == [20.0, 0.25]
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.json", "cpu.md", "cpu.png"]


def test_command(tmp_path, capsys):
    assert main(["--only", "nms_padded", "--quick", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "nms_padded: SSD300" in printed and "1 cases, fastcv is slower in 0" in printed
    assert (tmp_path / "cpu.md").exists()
    assert main(["--only", "no such operator"]) == 1


def test_names_are_unique():
    names = [each.name for each in find_cases("")]
    assert len(names) == len(set(names)) > 40


def test_ssd300_has_its_8732_boxes():
    boxes = shapes.ssd300_default_boxes()
    assert boxes.shape == (8732, 4)
    assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0 and boxes.max() <= 300


def test_scores_are_distinct():
    for scores in (shapes.random_boxes(50_000)[1], shapes.ssd300_candidates()[1]):
        assert len(scores.unique()) == len(scores)
