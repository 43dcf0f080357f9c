"""Import never fails: without libraries, or with broken ones, all runs on the reference path."""

import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, run_python

import fastcv

USE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastcv
    import fastcv.ops
import torch

about_fastcv = [w for w in caught if "fastcv" in str(w.message)]
assert len(about_fastcv) == 1, [str(w.message) for w in caught]
assert about_fastcv[0].category is RuntimeWarning
print(about_fastcv[0].message)

with warnings.catch_warnings():
    warnings.simplefilter("error")
    boxes = torch.tensor([[0., 0., 10., 10.], [1., 1., 10., 10.], [20., 20., 30., 30.]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    assert fastcv.ops.nms(boxes, scores, 0.5).tolist() == [0, 2]
    assert fastcv.ops.nms(boxes, scores, 0.5, iou_type="diou").tolist() == [0, 2]
    classes = torch.tensor([0, 1, 0])
    assert fastcv.ops.batched_nms(boxes, scores, classes, 0.5).tolist() == [0, 1, 2]
    padded = fastcv.ops.nms_padded(boxes[None], scores[None], 0.5, 4)
    assert padded.indices.tolist() == [[0, 2, -1, -1]]
    assert padded.counts.tolist() == [2]
    assert fastcv.ops.null(scores).tolist() == scores.tolist()
    x = torch.rand(3, requires_grad=True)
    fastcv.ops.null(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 1]

info = fastcv.build_info()
assert info["cpu_isa"] is None
assert {live["cpu"] for live in info["operators"].values()} == {"reference"}
"""


@pytest.fixture(params=["missing", "corrupt"])
def unbuilt(request, tmp_path):
    """A folder with fastcv in it, without its libraries or with broken ones."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastcv", tmp_path / "fastcv", ignore=ignored)
    (tmp_path / "setup.py").touch()  # as in a checkout
    if request.param == "corrupt":
        for library in (ROOT / "fastcv").glob("*.so"):
            (tmp_path / "fastcv" / library.name).write_bytes(b"not a library")
    return tmp_path


def test_reference_path(unbuilt):
    result = run_python(["-c", USE], paths=[unbuilt], cwd=unbuilt)
    assert result.returncode == 0, result.stderr
    assert f"pip install --no-build-isolation -e {unbuilt}" in result.stdout
    assert "pure-PyTorch reference path" in result.stdout


def test_info(unbuilt):
    result = run_python(["-m", "fastcv", "info"], paths=[unbuilt], cwd=unbuilt)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    (state,) = [line for line in lines if line.startswith("_C_cpu")]
    assert state.split(maxsplit=1)[1] != "loaded"
    assert any(line.split()[:2] == ["nms", "reference"] for line in lines)
    assert f"pip install --no-build-isolation -e {unbuilt}" in result.stdout


def test_patch_changes_nothing(unbuilt):
    """A reference in place of torchvision's kernel would be slower: it says so and stays away."""
    pytest.importorskip("torchvision")
    script = (
        "import fastcv, warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always'); fastcv.patch('torchvision')\n"
        "print([str(w.message) for w in caught if 'changes nothing' in str(w.message)])\n"
        "print(fastcv.build_info()['patched'])"
    )
    result = run_python(["-c", script], paths=[unbuilt], cwd=unbuilt)
    assert result.returncode == 0, result.stderr
    assert "--no-build-isolation" in result.stdout.splitlines()[0]
    assert result.stdout.splitlines()[1] == "{'torchvision': {'operators': [], 'functions': []}}"


def test_command_of_an_installed_wheel(unbuilt):
    (unbuilt / "setup.py").unlink()
    result = run_python(["-c", "import fastcv"], paths=[unbuilt], cwd=unbuilt)
    assert "pip install --no-build-isolation --force-reinstall fastcv-kernels" in result.stderr


def test_import_brings_no_torchvision():
    script = "import sys, fastcv, fastcv.__main__; print('torchvision' in sys.modules)"
    assert run_python(["-c", script]).stdout.strip() == "False"


def test_import_warns_of_nothing():
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", "import fastcv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_reference_on_another_device_warns_once():
    """No kernel for a device: the reference runs there, and says so at the first call."""
    from fastcv import _library

    _library._warn_reference.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            _library._warn_reference("nms", "xpu")
    assert [str(w.message) for w in caught] == [
        "fastcv::nms has no kernel for xpu tensors and runs on the slow pure-PyTorch reference path"
    ]


def test_build_info():
    info = fastcv.build_info()
    assert info["torch"] == torch.__version__
    assert info["libraries"]["_C_cpu"] == "loaded"
    assert info["cpu_isa"] in info["available_isas"]
    assert info["operators"]["nms"]["cpu"] == "compiled"
    assert info["threads"] == torch.get_num_threads()
