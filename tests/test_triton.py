"""Triton's kernels without a GPU: the operators' own tests in the interpreter, and compilation ahead of time."""

import importlib
import re

import pytest
from conftest import DEVICE_TESTS, ROOT, run_python

from fastcv import _library

pytest.importorskip("triton")
pytestmark = pytest.mark.emulated

STEMS = sorted(set(_library.TRITON.values()))
TESTED_WITH = {"ps_roi_pool": "ps_roi_align"}  # in the same file
ALSO = {"avg_pool2d": ["pooling_"]}  # tests of several operators
CAPABILITIES = {80: 166912, 90: 232448, 100: 232448, 120: 101376}  # with the shared memory that a block may have
# Compiled CUDA kernels come before most of these, and others take the interpreter long: they are tested in one or two
# types, without what takes longest, and in all by `make test-slow`.
TWO_TYPES = " and not float64 and not bfloat16"
ONE_TYPE = f"{TWO_TYPES} and not float16"
REGIONS = ("prroi_pool", "ps_roi_align", "roi_align", "roi_align_rotated", "roi_pool")
IN_PART = dict.fromkeys((*REGIONS, "conv2d_local", "paste_masks_in_image"), TWO_TYPES) | {
    "deform_conv2d": f"{TWO_TYPES} and not half_types and not nested and not wanted"
    + "".join(f" and not [{case}" for case in ("6-channels", "12-channels", "8-", "9-", "11-", "13-")),
    "match_boxes": ONE_TYPE,
    "matrix_nms": " and (not float64 or crowded or duplicates)",
    "nms": f"{ONE_TYPE} and not rotated and not copies and not union and not 3000 and not (oracle and not crowded)",
    "nms_rotated": f"{ONE_TYPE} and not 1100",
    "soft_nms": " and not naive_is_nms and not properties and not strides and (not float64 or (duplicates and linear))",
    "weighted_boxes_fusion": " and not units and (not matches or (float64 and box_and)) and (not hundreds or max)",
}
# Derivatives by differences are hundreds of calls, for minutes in the interpreter.
LEFT_OUT = {"deform_conv2d": " and not gradcheck"}
MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}


def runs():
    for stem in STEMS:
        left_out = LEFT_OUT.get(stem, "")
        if stem in IN_PART:
            yield pytest.param(stem, IN_PART[stem] + left_out, id=f"{stem}-in part")
            yield pytest.param(stem, left_out, id=f"{stem}-all", marks=pytest.mark.slow)
        elif stem not in TESTED_WITH:
            yield pytest.param(stem, "", id=stem)


@pytest.mark.parametrize("stem, select", list(runs()))
def test_passes_the_operators_tests(stem, select):
    names = [name for name, module in _library.TRITON.items() if stem in (module, TESTED_WITH.get(module))]
    prefixes = {stem, *names, *ALSO.get(stem, ())}
    files = sorted({str(path) for prefix in prefixes for path in (ROOT / "tests/ops").glob(f"test_{prefix}*.py")})
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "backends.triton_interpreter", "-o", "addopts="]
    arguments += ["-k", DEVICE_TESTS + select, *files]
    result = run_python(arguments, paths=[ROOT, ROOT / "tests"], environment={"TRITON_INTERPRET": "1"})
    output = result.stdout + result.stderr
    assert result.returncode == 0 and " passed" in output, output[-6000:]
    called = re.search("calls of Triton kernels: (.*)", output)[1]
    assert all(f"{name} " in called for name in names), (names, called)


def test_comes_before_compiled_kernels_only_where_asked_for():
    names = ("deform_conv2d", "roi_align")
    script = f"import fastcv; print(*(fastcv._library.implementation(name, 'cuda') for name in {names}))"
    for value, first in (("", "compiled"), ("all", "triton"), ("plan", "plan")):
        result = run_python(["-W", "error", "-c", script], environment={"FASTCV_TRITON": value})
        expected = [first, "compiled"] if _library.cuda_loaded else ["triton", "triton"]
        assert result.stdout.split() == expected, result.stderr


def test_indices_outside_the_map():
    """No kernel can raise: they are nobody's, and NaN says that there was one."""
    script = """
import torch
from fastcv.ops._pooling import window
from fastcv.triton_kernels.max_pool2d import max_unpool2d, max_unpool2d_backward
values, grad = torch.ones(1, 2, 2, 3), torch.ones(1, 2, 4, 6)
for bad in (24, -1, 2**40, -(2**63)):
    indices = torch.tensor([[[0, 3, 5], [12, 14, 16]], [[0, 3, bad], [12, bad, 16]]])[None]
    for sum in (False, True):
        out = max_unpool2d(values, indices, 4, 6, *window(2, 2, 0), sum)[0]
        assert out[0].sum() == 6 and out[1].isnan().flatten().nonzero().tolist() == [[0]] and out[1].nansum() == 3
        gradient = max_unpool2d_backward(grad, indices, *window(2, 2, 0), sum)
        assert torch.equal(gradient.isnan(), indices == bad)
compact = torch.tensor([[[0, 1, 2], [3, 3, 4]], [[3, 2, 255], [0, 0, 0]]], dtype=torch.uint8)[None]
out = max_unpool2d(values, compact, 4, 6, *window(2, 2, 0), False)
assert out[0, 0].sum() == 5 and out[0, 1].sum() == 5
gradient = max_unpool2d_backward(grad, compact, *window(2, 2, 0), False)
assert gradient.isnan().nonzero().tolist() == [[0, 0, 1, 2], [0, 1, 0, 2]]
"""
    result = run_python(["-c", script], environment={"TRITON_INTERPRET": "1"})
    assert result.returncode == 0, result.stderr


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
