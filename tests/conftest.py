"""Shared by the tests: the repository's folder, and Python in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

if os.environ.get("FASTCV_TEST_WITHOUT_TORCHVISION"):
    # As if it were not installed: one built for another torch raises more than ImportError.
    sys.modules["torchvision"] = None

# The tests of an operator that exercise its kernels: what depends on the instruction set or on
# libtorch's binary interface, and not the compiler or the derivatives of derivatives.
KERNEL_TESTS = (
    "not compile and not opcheck and not grad and not vmap and not jvp and not derivative "
    "and not error and not raises and not torchvision and not forward_mode and not export "
    "and not slow and not big and not large and not many and not memory and not threads "
    "and not ensemble"
)
# And those of its gradients: what a kernel for another device must pass.
DEVICE_TESTS = KERNEL_TESTS.replace("and not grad ", "")


def pytest_make_parametrize_id(val):
    """Names such as "channels_last" and "float32"; pytest's own, "memory_format1", are to KERNEL_TESTS about memory."""
    return str(val).removeprefix("torch.") if isinstance(val, (torch.memory_format, torch.dtype)) else None


def run_python(
    arguments: Sequence[str],
    *,
    paths: Sequence[Path] = (ROOT,),
    environment: dict[str, str] | None = None,
    cwd: Path = ROOT,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter with ``paths`` before all others; output as text, status unchecked."""
    path = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def kernel_test_files() -> list[Path]:
    """The tests of operators that have a folder in ``csrc`` or are registered as ``fastcv::``."""
    from fastcv import _library

    names = {folder.name for folder in (ROOT / "csrc").iterdir()} | set(_library.OPERATORS)
    return [path for path in sorted((ROOT / "tests/ops").glob("*.py")) if path.stem[5:] in names]


def run_kernel_tests(files: Sequence[Path], select: str = KERNEL_TESTS, **options) -> str:
    """Runs the kernel tests of operators in a fresh process; returns the output if they pass."""
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "-k", select]
    result = run_python([*arguments, *map(str, files)], **options)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-6000:]
    assert " passed" in output, output[-6000:]
    return output


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    """Fails a test that leaves a package patched."""
    import fastcv

    yield
    assert fastcv.build_info()["patched"] == {}
