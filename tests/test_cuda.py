"""CUDA kernels without a GPU: the operators' own tests on the host, and what the assembler says of them."""

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from conftest import DEVICE_TESTS, ROOT, run_python

SOURCES = sorted(ROOT.glob("csrc/*/*_cuda.cu"))
# Tests beside those of the operator with the folder's name.
ALSO = {"box_iou_rotated": ["nms_rotated"], "nms": ["nms_padded"], "roi_align": ["multiscale_roi_align"]}


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    """The library of all kernels, compiled by the host's compiler."""
    scripts = sysconfig.get_path("scripts")
    tools = [shutil.which(name, path=scripts) or shutil.which(name) for name in ("cmake", "ninja")]
    if not all(tools):
        pytest.skip("needs cmake and ninja")
    folder = tmp_path_factory.mktemp("cuda_emulation")
    torch_folder = Path(torch.__file__).parent
    for arguments in (
        ["-S", ROOT / "tests/cuda_emulation", "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools[1]}",
         f"-DFASTCV_TORCH_DIR={torch_folder}"],
        ["--build", folder],
    ):  # fmt: skip
        result = subprocess.run([tools[0], *map(str, arguments)], capture_output=True, text=True)
        assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
        assert "warning:" not in result.stdout, result.stdout[-6000:]
    return folder / "cuda_emulation.so"


@pytest.mark.emulated
@pytest.mark.parametrize("operator", sorted({path.parent.name for path in SOURCES}))
def test_passes_the_operators_tests(operator, emulation):
    files = [f"tests/ops/test_{name}.py" for name in (operator, *ALSO.get(operator, []))]
    check_passes(emulation, DEVICE_TESTS, files)


@pytest.mark.emulated
def test_passes_those_of_whole_detectors(emulation):
    pytest.importorskip("torchvision")
    check_passes(emulation, "same_detections", ["tests/accelerate/test_detectors.py"])


def check_passes(emulation, select, files):
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "backends.cuda_emulation", "-o", "addopts="]
    paths = [ROOT, ROOT / "tests"]
    environment = {"FASTCV_CUDA_EMULATION": str(emulation)}
    files = [str(ROOT / file) for file in files]
    result = run_python([*arguments, "-k", select, *files], paths=paths, environment=environment)
    output = result.stdout + result.stderr
    assert result.returncode == 0 and " passed" in output, output[-6000:]
    assert int(re.search(r"launches of CUDA kernels: (\d+)", output)[1]) > 0


@pytest.mark.emulated
def test_regions_of_no_image(emulation):
    """A kernel cannot raise: what was asked of no image is NaN, and gives no gradient."""
    script = f"""
import torch, fastcv
torch.ops.load_library({str(emulation)!r})
x = torch.ones(2, 3, 8, 8, requires_grad=True)
boxes = torch.tensor([[float(image), 0, 0, 4, 4] for image in (0, 2, -1, "nan", 1)])
y = fastcv.ops.roi_align(x, boxes, 2)
assert y[[0, 4]].eq(1).all() and y[1:4].isnan().all()
y.backward(torch.ones_like(y))
assert abs(x.grad.sum() - 2 * 3 * 4) < 1e-4
"""
    result = run_python(["-c", script])
    assert result.returncode == 0, result.stderr


def test_no_register_is_spilled():
    library = ROOT / "fastcv/_C_cuda.so"
    if not library.exists() or not importlib.util.find_spec("triton"):
        pytest.skip("needs the compiled CUDA part, and cuobjdump, which comes with Triton")
    from benchmarks.gpu_kernels import cuda_usage

    usage = cuda_usage(library)
    assert len({capability for numbers in usage.values() for capability in numbers}) >= 4
    assert {name: n for name, n in usage.items() if any(stack for _, stack, _ in n.values())} == {}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_launches_go_through_one_function(source):
    """What the emulation cannot compile: launches in triple brackets, and raw PTX."""
    text = source.read_text()
    assert "<<<" not in text and "asm" not in re.findall(r"\w+", text)


def test_every_source_states_its_floor():
    pytest.importorskip("triton")
    from benchmarks.gpu_kernels import _floors

    assert {path.stem.removesuffix("_cuda") for path in SOURCES} <= set(_floors())
