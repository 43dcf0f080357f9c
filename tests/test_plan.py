"""Which of two kernels serves a call, without a GPU: choices, their file, and what is measured again."""

import json

import pytest
import torch
from conftest import run_python

from fastcv import _plan
from fastcv._plan import Plan, for_graphs, kind, planned, rounded


@pytest.fixture(autouse=True)
def capturing(monkeypatch):
    """What a GPU would say."""
    state = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[0])
    return state


PARAMETERS = ["input", "weight", "bias", "stride"]


def test_sizes_in_buckets():
    assert [rounded(n) for n in (1, 7, 8, 9, 56, 57, 64, 65, 1088)] == [1, 7, 8, 10, 56, 64, 64, 80, 1280]


def kind_of(*shape, dtype=torch.float32, weight=(8, 4, 3, 3), last=False, stride=1):
    x = torch.empty(shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    return kind("conv2d", PARAMETERS, (x, torch.empty(weight), None, [stride, stride]))


def test_calls_alike():
    same = kind_of(2, 4, 57, 60)
    assert same == kind_of(2, 4, 64, 64) and "input=2x4x64x64 float32 contiguous/4" in same
    others = [
        kind_of(3, 4, 64, 64), kind_of(2, 4, 65, 64), kind_of(2, 5, 64, 64), kind_of(2, 4, 64, 64, last=True),
        kind_of(2, 4, 64, 64, dtype=torch.float16), kind_of(2, 4, 64, 64, weight=(8, 4, 2, 3)),
        kind_of(2, 4, 64, 64, weight=(9, 4, 3, 3)), kind_of(2, 4, 64, 64, stride=2), kind_of(2, 4, 57, 59),
    ]  # fmt: skip
    with for_graphs():
        others.append(kind_of(2, 4, 64, 64))
    assert len({same, *others}) == 1 + len(others)


def test_precision_tells_calls_apart():
    before, seen = torch.backends.cuda.matmul.fp32_precision, kind_of(1, 4, 8, 8)
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert kind_of(1, 4, 8, 8) != seen
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


class Timer:
    """Seconds by name, and how often it was asked."""

    def __init__(self, **seconds):
        self.seconds, self.asked = seconds, []

    def __call__(self, thunks):
        self.asked.append(list(thunks))
        return {name: self.seconds[name] for name in thunks}


def gram(tmp_path, timer, ours=None):
    """``fastcv::gram_matrix`` by plan, and which kernels ran."""
    ran = []

    def of(name, function):
        def run(*args):
            ran.append(name)
            return function(*args)

        return run

    reference = lambda x, normalize: x.flatten(2) @ x.flatten(2).mT  # noqa: E731
    plan = Plan(tmp_path / "gpu.json", timer)
    return planned("gram_matrix", of("ours", ours or reference), of("theirs", reference), lambda device: plan), ran


@pytest.mark.parametrize("seconds, chosen", [((1.0, 2.0), "ours"), ((2.0, 1.0), "theirs"), ((1.0, 1.0), "theirs")])
def test_the_faster_one_serves(tmp_path, seconds, chosen):
    timer = Timer(triton=seconds[0], other=seconds[1])
    run, ran = gram(tmp_path, timer)
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(run(x, "none"), x.flatten(2) @ x.flatten(2).mT)
    for shape in ((2, 3, 4, 5), (2, 3, 4, 5), (2, 3, 5, 4)):  # the last of another shape, and measured by itself
        ran.clear()
        run(torch.randn(shape), "none")
        assert ran[-1] == chosen
    assert timer.asked == [["triton", "other"]] * 2
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert [c[0] for c in stored.values()] == [chosen == "ours"] * 2


def test_choices_last(tmp_path):
    x = torch.randn(1, 3, 4, 4)
    gram(tmp_path, Timer(triton=1, other=2))[0](x, "none")
    timer = Timer(triton=2, other=1)
    run, ran = gram(tmp_path, timer)  # as in another process
    run(x, "none")
    assert ran == ["ours"] and timer.asked == []


def test_processes_keep_what_others_found(tmp_path):
    first, second = (gram(tmp_path, Timer(triton=1, other=2))[0] for _ in range(2))
    first(torch.randn(1, 3, 4, 4), "none")
    second(torch.randn(1, 5, 4, 4), "none")
    assert len(json.loads((tmp_path / "gpu.json").read_text())) == 2


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": [1, 2, 3]}', '{"a": [true]}', '{"a": [true, -1, 2]}'])
def test_a_broken_file_is_written_anew(tmp_path, text):
    (tmp_path / "gpu.json").write_text(text)
    with pytest.warns(RuntimeWarning, match="holds no choices"):
        run, _ = gram(tmp_path, Timer(triton=1, other=2))
    with pytest.warns(RuntimeWarning, match="holds no choices"):
        run(torch.randn(1, 3, 4, 4), "none")
    assert len(json.loads((tmp_path / "gpu.json").read_text())) == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.warns(RuntimeWarning, match="not kept"):
        gram(tmp_path / "taken", Timer(triton=1, other=2))[0](torch.randn(1, 3, 4, 4), "none")


def raises(*args):
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    "ours, problem",
    [
        (raises, "fails .RuntimeError: no such instruction"),
        (lambda x, n: 1.05 * x.flatten(2) @ x.flatten(2).mT, "differs by 5"),
        (lambda x, n: (x.flatten(2) @ x.flatten(2).mT) / 0, "differs by inf"),
        (lambda x, n: x, "gives .1, 3, 4, 4. in torch.float32 instead of .1, 3, 3."),
    ],
)
def test_what_fails_or_differs_never_serves(tmp_path, ours, problem):
    timer = Timer(triton=1, other=2)
    run, ran = gram(tmp_path, timer, ours)
    x = torch.randn(1, 3, 4, 4)
    with pytest.warns(RuntimeWarning, match=problem):
        result = run(x, "none")
    assert torch.equal(result, x.flatten(2) @ x.flatten(2).mT) and timer.asked == [["other"]]
    ran.clear()
    run(x, "none")
    assert ran == ["theirs"]
    assert gram(tmp_path, timer, ours)[0](x, "none").shape == (1, 3, 3)  # another process knows, too


def test_errors_of_the_call_are_its_own(tmp_path):
    run, _ = gram(tmp_path, Timer(triton=1, other=2))
    with pytest.raises(IndexError):
        run(torch.tensor(1.0), "none")
    assert not (tmp_path / "gpu.json").exists()


def test_nan_says_nothing(tmp_path):
    x = torch.randn(1, 3, 4, 4)
    x[0, 1] = float("nan")
    run, ran = gram(tmp_path, Timer(triton=1, other=2))
    run(x, "none")
    assert ran[-1] == "ours"


def test_nothing_is_measured_while_a_graph_is_captured(tmp_path, capturing):
    timer = Timer(triton=1, other=2)
    run, ran = gram(tmp_path, timer)
    capturing[0] = True
    x = torch.randn(1, 3, 4, 4)
    run(x, "none")
    assert ran == ["theirs"] and timer.asked == []
    capturing[0] = False
    run(x, "none")
    assert ran[-1] == "ours"


def test_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCV_CACHE", str(tmp_path))
    assert _plan.cache_folder() == tmp_path
    monkeypatch.delenv("FASTCV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _plan.cache_folder() == tmp_path / "fastcv"


def test_what_asks_for_it():
    pytest.importorskip("triton")
    script = """
import fastcv
on = {name: where["cuda"] for name, where in fastcv.build_info()["operators"].items()}
assert on["conv2d"] == on["conv_transpose2d"] == on["gram_matrix"] == on["style_loss"] == "plan"
assert on["conv2d_prepare"] == on["max_pool2d"] == "triton"
"""
    result = run_python(["-c", script], environment={"FASTCV_TRITON": "plan"})
    assert result.returncode == 0, result.stderr
    result = run_python(["-c", "import fastcv"], environment={"FASTCV_TRITON": "some"})
    assert result.returncode == 0 and 'FASTCV_TRITON: expected "all", "plan" or nothing' in result.stderr


@pytest.mark.emulated
def test_convolution_by_plan(tmp_path):
    """Triton's kernel, in its interpreter, against torch's: results that agree, and the faster one's from then on."""
    pytest.importorskip("triton")
    script = f"""
import pathlib, torch, fastcv
from fastcv import _library, _plan, reference
torch.cuda.is_current_stream_capturing = lambda: False
kernel, seen = _library.triton_kernel("conv2d"), []
plan = _plan.Plan(pathlib.Path({str(tmp_path)!r}) / "cpu.json", lambda thunks: {{"triton": 1.0, "other": 2.0}})
run = _plan.planned("conv2d", kernel, reference.conv2d.conv2d, lambda device: plan)
x, weight, bias = torch.randn(2, 16, 9, 11), torch.randn(24, 16, 3, 3), torch.randn(24)
for _ in range(2):
    y = run(x, weight, bias, None, None, 1, [1, 1], [1, 1], [1, 1], "relu", 0.0, "auto")
    torch.testing.assert_close(y, torch.conv2d(x, weight, bias, padding=1).relu(), rtol=1e-5, atol=1e-4)
(call, choice), = plan.choices.items()
assert choice.ours and call.startswith("conv2d(input=2x16x10x12 float32 contiguous/1, weight=24x16x3x3"), call
"""
    result = run_python(["-W", "error", "-c", script], environment={"TRITON_INTERPRET": "1"})
    assert result.returncode == 0, result.stderr
