"""One binary, two versions of torch: libtorch's stable ABI keeps its promise."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_kernel_tests, run_python

OTHER = "2.13.0" if not torch.__version__.startswith("2.13") else "2.14.1"


@pytest.fixture(scope="module")
def other_torch():
    """A folder with the other torch, installed by pip and kept in build/."""
    tag = f"{sys.implementation.cache_tag}-torch-{OTHER}"
    folder = ROOT / "build" / tag
    if not (folder / "torch").exists():
        temporary = folder.with_name(f"{tag}.{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--target", str(temporary), f"torch=={OTHER}"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if result.returncode:
            pytest.skip(f"torch {OTHER} could not be installed: {result.stderr.strip()[-300:]}")
        temporary.rename(folder)
    result = run_python(["-c", "import torch; print(torch.__version__)"], paths=[folder])
    if result.returncode:
        pytest.skip(f"torch {OTHER} does not run beside this one's packages: {result.stderr[-300:]}")
    assert result.stdout.startswith(OTHER)
    return folder


def test_binary_loads_and_passes(other_torch):
    options = {
        "paths": [ROOT, other_torch],
        "environment": {"FASTCV_TEST_WITHOUT_TORCHVISION": "1"},
    }
    script = "import fastcv; i = fastcv.build_info(); print(i['torch'], i['libraries']['_C_cpu'])"
    result = run_python(["-W", "error::RuntimeWarning", "-c", script], **options)
    assert result.returncode == 0, result.stderr
    version, state = result.stdout.split(maxsplit=1)
    assert version.startswith(OTHER) and state.strip() == "loaded"
    # Every operator once, and the two with the most use of torch's interface at length.
    names = ("test_stable_boxing", "ops/test_null", "ops/test_nms", "ops/test_roi_align")
    files = [path for name in names if (path := ROOT / f"tests/{name}.py").exists()]
    run_kernel_tests(files, **options)
