"""Triton's kernels without a GPU: the operators' own tests in the interpreter, and compilation ahead of time."""

import importlib
import re

import pytest
from conftest import DEVICE_TESTS, ROOT, run_python

from fastcv import _library

pytest.importorskip("triton")
pytestmark = pytest.mark.emulated

STEMS = sorted(set(_library.TRITON.values()))
CAPABILITIES = {80: 166912, 90: 232448, 100: 232448, 120: 101376}  # with the shared memory that a block may have
MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}


@pytest.mark.parametrize("stem", STEMS)
def test_passes_the_operators_tests(stem):
    files = [str(path) for path in sorted((ROOT / "tests/ops").glob(f"test_{stem}*.py"))]
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "backends.triton_interpreter", "-o", "addopts="]
    paths = [ROOT, ROOT / "tests"]
    result = run_python([*arguments, "-k", DEVICE_TESTS, *files], paths=paths, environment={"TRITON_INTERPRET": "1"})
    output = result.stdout + result.stderr
    assert result.returncode == 0 and " passed" in output, output[-6000:]
    called = re.search("calls of Triton kernels: (.*)", output)[1]
    for name, module in _library.TRITON.items():
        assert module != stem or f"{name} " in called, (name, called)


def variants():
    for stem in STEMS:
        for i, variant in enumerate(importlib.import_module(f"fastcv.triton_kernels.{stem}").VARIANTS):
            yield pytest.param(variant, id=f"{variant.name}-{i}")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("variant", list(variants()))
def test_compiles_without_spills(variant, capability):
    from fastcv.triton_kernels._launch import compile_ahead

    report = compile_ahead(variant, capability)
    assert report.stack == 0 and report.shared <= CAPABILITIES[capability]
    assert not variant.matrix or report.matrix == MATRIX[capability]
