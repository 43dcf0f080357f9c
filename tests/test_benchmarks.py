"""The harness of the benchmarks: it refuses contenders that disagree, and shows losses."""

import json
import multiprocessing
import os
import time

import pytest
import torch

pytest.importorskip("torchvision")

from benchmarks import all_models, harness, models, report, shapes
from benchmarks.__main__ import find_cases, main
from fastcv._plan import Choice


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


def test_ratio_is_to_the_best_of_the_others():
    seconds = {"fastcv": 2.0, "torch, channels-last": 8.0, "torch, contiguous": 3.0, "fastcv, in steps": 1.0}
    times = {name: harness.Times(t, t, t, 7) for name, t in seconds.items()}
    result = harness.Result("max_pool2d", "3x3", times)
    assert (result.baseline, result.ratio) == ("torch, contiguous", 1.5)


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


def test_a_gpu_needs_another_kernel_than_torchs(capsys):
    assert main(["--device", "cuda"]) == 1
    assert "set FASTCV_TRITON=all, or plan" in capsys.readouterr().err


def test_the_others_are_measured_where_one_fails(tmp_path, capsys, monkeypatch):
    cases = [case(lambda x: x + 1, torch.square), case(lambda x: x * x, torch.square)]
    monkeypatch.setattr("benchmarks.__main__.find_cases", lambda only, device: cases)
    assert main(["--quick", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "1 cases, fastcv is slower in" in printed.out
    assert "square: 3 floats: fastcv disagrees" in printed.err
    assert printed.err.endswith("not measured, as they failed: square: 3 floats\n")


def test_choices_are_written(tmp_path):
    choices = {"conv2d(b)": Choice(False, None, 2e-3), "conv2d(a)": Choice(True, 1e-3, 2e-3)}
    report.save_choices(tmp_path / "choices.md", choices, harness.environment())
    text = (tmp_path / "choices.md").read_text()
    assert ": of 2 kinds of calls 1 by Triton's kernel" in text
    assert text.endswith("| `conv2d(a)` | Triton | 1 ms | 2 ms |\n| `conv2d(b)` | other | refused | 2 ms |\n")


def test_names_are_unique():
    for device in ("cpu", "cuda"):
        names = [each.name for each in find_cases("", device)]
        assert len(names) == len(set(names)) > 40


def test_models_for_a_gpu():
    """Their contenders but the compiled ones, on a small model."""
    from benchmarks import gpu_models

    torch.manual_seed(0)
    model, x = (
        torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 5, 1)),
        torch.rand(2, 3, 9, 9),
    )
    for contenders, tolerance in ((gpu_models.FLOAT32, 1e-5), (gpu_models.BFLOAT16, 0.05)):
        thunks = {name: prepare(model, x) for name, prepare in contenders.items() if "compile" not in name}
        assert next(iter(thunks)) == "fastcv" and len(thunks) == 3
        for thunk in thunks.values():
            gpu_models._same_scores(tolerance)(thunk(), thunks["fastcv"]())
    boxes = torch.rand(4, 4) * 100
    found = [{"boxes": boxes, "labels": torch.arange(4)}]
    gpu_models._same_detections(0.9)(found, found)
    with pytest.raises(AssertionError, match="no like"):
        gpu_models._same_detections(0.9)(found, [{"boxes": boxes, "labels": torch.arange(4) + 1}])


def test_ssd300_has_its_8732_boxes():
    boxes = shapes.ssd300_default_boxes()
    assert boxes.shape == (8732, 4)
    assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0 and boxes.max() <= 300


def test_scores_are_distinct():
    for scores in (shapes.random_boxes(50_000)[1], shapes.ssd300_candidates()[1]):
        assert len(scores.unique()) == len(scores)


def test_table_of_models():
    rows = [
        models.Row(
            "resnet18", {"fastcv": 0.01, "torch": 0.025, "OpenVINO": 0.02}, {"ONNX Runtime": "not installed (onnx)"}
        ),
        models.Row("vgg16", {"fastcv": 0.1, "torch": 0.2, "OpenVINO": 0.09}, {"ONNX Runtime": "not installed (onnx)"}),
    ]
    text = models.table(rows, {"processor": "P", "threads": 2, "torch": "2"})
    assert "| resnet18 | 10.0 | 25.0 | not installed (onnx) | 20.0 | 2.50 | 2.00 |" in text
    assert "| vgg16 | 100.0 | 200.0 | not installed (onnx) | 90.0 | 2.00 | 0.90 |" in text
    assert "torch 2.24, OpenVINO 1.34." in text
    assert "Not measured: torch, channels-last, torch.compile." in text
    assert "| resnet18 | 25.0 | 20.0 | 10.0 |" in models.short_table(rows)
    rows[0].seconds["torch, channels-last"] = 0.015
    assert "| resnet18 | 15.0 | 20.0 | 10.0 |" in models.short_table(rows)


def test_rows_measured_again():
    def row(name, seconds):
        return models.Row(name, {"fastcv": seconds, "torch": 1.0}, {})

    kept, again = [row("vgg16", 0.1), row("other", 0.2), row("resnet18", 0.3)], [row("vgg16", 0.4), row("alexnet", 0.5)]
    rows = models.updated(kept, again)
    assert [(r.model, r.seconds["fastcv"]) for r in rows] == [
        ("alexnet", 0.5), ("vgg16", 0.4), ("resnet18", 0.3), ("other", 0.2)
    ]  # fmt: skip


def test_outputs_of_runtimes_must_agree():
    expected = [torch.tensor([1.0, 2.0]).numpy()]
    models._check("resnet18", "OpenVINO", [expected[0] + 1e-4], expected)
    with pytest.raises(AssertionError, match="resnet18: OpenVINO differs from torch"):
        models._check("resnet18", "OpenVINO", [expected[0] + 0.1], expected)


@pytest.mark.parametrize(
    ("target", "argument", "limit", "why"),
    [(time.sleep, 60, 0.2, "compiling took over 0.2 s"), (os._exit, 3, None, "failed (exit status 3)")],
)
def test_runtimes_that_never_get_ready(target, argument, limit, why):
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=target, args=(argument,), daemon=True)
    process.start()
    if limit is None:
        other.close()
    assert models._first_outputs(pipe, process, limit) == why
    assert not process.is_alive()


def test_torch_compile_can_be_left_out(monkeypatch, capsys):
    asked = []

    def measure(name, runtimes, threads, compile_limit):
        asked.append((runtimes, compile_limit))
        return models.Row(name, {"fastcv": 0.01, "torch": 0.02}, {})

    monkeypatch.setattr(models, "measure", measure)
    threads = ["--threads", str(torch.get_num_threads())]
    models.main(["--models", "resnet18", *threads])
    models.main(["--models", "resnet18", "--no-compile", "--compile-limit", "7", *threads])
    assert asked[0] == (models.RUNTIMES, models.COMPILE_LIMIT)
    assert asked[1] == (tuple(r for r in models.RUNTIMES if r != "torch.compile"), 7)
    assert "| resnet18 | 10.0 | 20.0 |" in capsys.readouterr().out


def test_every_model_has_a_row():
    row = all_models.measure("squeezenet1_1", rounds=1)
    assert row["programs"] == 1 and row["in torch"] == 0 and row["left"] == 0 and float(row["difference"]) < 1e-4
    row["ratio"] = 0.5
    assert "| **0.50** |" in all_models.table([row], {"processor": "P", "threads": 2, "torch": "2"})


@pytest.mark.slow
def test_runtimes_take_turns():
    row = models.measure("squeezenet1_1", ("fastcv", "torch", "OpenVINO"), threads=1)
    assert {"fastcv", "torch"} <= row.seconds.keys() and row.seconds.keys() | row.missing.keys() >= {"OpenVINO"}
