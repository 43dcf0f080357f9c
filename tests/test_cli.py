"""python -m fastcv: info, run, detect."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python

import fastcv
from fastcv.__main__ import main
from fastcv._files import replacing
from fastcv.cli import detect

SCRIPT = """
import sys, os, fastcv
print(__name__, sys.argv[1:], os.path.basename(sys.argv[0]), os.path.basename(__file__))
print(os.path.samefile(sys.path[0], os.path.dirname(__file__)))
import helper
print("torchvision" in fastcv.build_info()["patched"])
print(sys.modules["__main__"].__dict__ is globals())
sys.exit(int(sys.argv[1]))
"""


def test_info(capsys):
    assert main(["info"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["fastcv", fastcv.__version__] in lines
    assert ["_C_cpu", "loaded"] in lines
    assert any(line[:2] == ["nms", "compiled"] for line in lines)


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["operators"] == fastcv.build_info()["operators"]
    assert facts["cpu_isa"] == fastcv.build_info()["cpu_isa"]


def test_info_shows_patches(capsys):
    pytest.importorskip("torchvision")
    with fastcv.patched("torchvision"):
        main(["info"])
    assert "torchvision: nms (cpu)" in capsys.readouterr().out


def test_console_script():
    script = Path(sys.executable).with_name("fastcv")
    if not script.exists():
        pytest.skip("fastcv is not installed in this environment: no console script")
    result = subprocess.run([script, "info"], capture_output=True, text=True, cwd=ROOT.parent)
    assert result.returncode == 0, result.stderr
    assert "_C_cpu" in result.stdout


@pytest.mark.parametrize("status", [0, 3])
def test_run_a_script(tmp_path, status):
    pytest.importorskip("torchvision")
    (tmp_path / "program.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("print('helped')")
    words = ["run", str(tmp_path / "program.py"), str(status), "-m", "--help", "two words"]
    result = run_python(["-m", "fastcv", *words])
    assert result.returncode == status, result.stderr
    assert result.stdout.splitlines() == [
        f"__main__ ['{status}', '-m', '--help', 'two words'] program.py program.py",
        "True",
        "helped",
        "True",
        "True",
    ]


def test_run_a_module(tmp_path):
    pytest.importorskip("torchvision")
    (tmp_path / "program.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("print('helped')")
    result = run_python(["-m", "fastcv", "run", "-m", "program", "0", "--x"], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "__main__ ['0', '--x'] program.py program.py"


def test_run_shows_the_exception_of_the_script(tmp_path):
    pytest.importorskip("torchvision")
    (tmp_path / "program.py").write_text("raise KeyError('mine')")
    result = run_python(["-m", "fastcv", "run", str(tmp_path / "program.py")])
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "KeyError: 'mine'"


def test_run_errors(capsys):
    for words, message in ((["run"], "expected a script"), (["run", "no.py"], "no.py")):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])


# ---- detect --------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "grey.png"
    image.new("RGB", (64, 48), (128, 128, 128)).save(path)
    return path


class FixedModel(torch.nn.Module):
    """Always finds the same two things."""

    def forward(self, images):
        assert images[0].shape == (3, 48, 64) and 0 <= images[0].min() <= images[0].max() <= 1
        assert "torchvision" in fastcv.build_info()["patched"]
        boxes = torch.tensor([[10.0, 10, 30, 30], [40, 5, 60, 40]])
        return [{"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": torch.tensor([0.9, 0.3])}]


def test_detect(picture, tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    monkeypatch.setattr(detect, "load_model", lambda name: (FixedModel(), ["none", "cat", "dog"]))
    output = tmp_path / "folder" / "out.png"
    assert main(["detect", str(picture), "--output", str(output)]) == 0
    assert capsys.readouterr().out.splitlines() == ["cat 0.90  [10, 10, 30, 30]"]
    drawn = image.open(output)
    assert drawn.size == (64, 48)
    assert drawn.getpixel((10, 20)) == (255, 0, 0)  # the left side of the box
    assert drawn.getpixel((50, 45)) == (128, 128, 128)
    assert [path.name for path in output.parent.iterdir()] == ["out.png"]
    assert fastcv.build_info()["patched"] == {}


def test_detect_nothing(picture, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchvision")
    monkeypatch.setattr(detect, "load_model", lambda name: (FixedModel(), ["none", "cat", "dog"]))
    monkeypatch.chdir(tmp_path)
    assert main(["detect", str(picture), "--score", "0.95"]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "grey_detections.png").exists()


def test_detect_without_weights(picture, monkeypatch, tmp_path):
    pytest.importorskip("torchvision")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(SystemExit, match="neither cached nor downloadable") as stopped:
        main(["detect", str(picture), "--model", "ssdlite320_mobilenet_v3_large"])
    assert "no route to host" in str(stopped.value)
    assert str(tmp_path) in str(stopped.value)


def test_detect_errors(picture, tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(SystemExit, match=r"--model: expected one of .*, got resnet18"):
        main(["detect", str(picture), "--model", "resnet18"])
    with pytest.raises(SystemExit, match="cannot read"):
        main(["detect", str(tmp_path / "no.png")])


def test_a_file_is_whole_or_old(tmp_path):
    path = tmp_path / "result.txt"
    with replacing(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_compare(capsys):
    pytest.importorskip("torchvision")
    assert main(["compare", "mobilenet_v3_small", "--size", "64", "64", "--rounds", "2", "--program"]) == 0
    printed = capsys.readouterr().out
    assert "1 program with 54 convolutions" in printed and "largest relative difference" in printed
    assert "conv 3x3/2 g16" in printed
    assert main(["compare", "resnet18", "--size", "64", "64", "--rounds", "2", "--program", "--low-memory"]) == 0
    assert re.search(r"winograd\S* x\d", capsys.readouterr().out)
    with pytest.raises(SystemExit, match="expected a name of torchvision's"):
        main(["compare", "resnet9000"])
    with pytest.raises(SystemExit, match="--batch: expected a positive number, got 0"):
        main(["compare", "resnet18", "--batch", "0"])
