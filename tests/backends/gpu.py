"""A pytest plugin: the kernels of a GPU in the place of the CPU's. Tensors go there, and results come back.

    python -m pytest -p backends.gpu tests/ops/test_null.py

So the tests of an operator test its kernels on the GPU, on the same data. With FASTCV_TEST_TRITON=1 those in Triton
also where there are compiled ones. A run in which none was called fails.
"""

import os

import pytest
import torch
from torch.utils._pytree import tree_map_only

calls: dict[str, int] = {}


def pytest_configure():
    from fastcv import _library

    only_triton = os.environ.get("FASTCV_TEST_TRITON") == "1"
    for name in _library.TRITON if only_triton else _library.OPERATORS:
        if only_triton:
            kernel = _library.triton_kernel(name)
        elif _library.implementation(name, "cuda") in ("compiled", "triton"):
            kernel = getattr(torch.ops.fastcv, name)
        else:
            continue
        calls[name] = 0
        _library.LIBRARY.impl(name, _on_gpu(name, kernel), "CPU", allow_override=True)


def _on_gpu(name, kernel):
    def run(*args, **kwargs):
        calls[name] += 1
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x.cuda(), (args, kwargs))
        return tree_map_only(torch.Tensor, lambda x: x.cpu(), kernel(*args, **kwargs))

    return run


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, where it is there
def pytest_testnodedown(node, error):
    for name, count in getattr(node, "workeroutput", {}).get("calls", {}).items():
        calls[name] += count


def pytest_terminal_summary(terminalreporter):
    called = ", ".join(f"{name} {count}" for name, count in calls.items() if count)
    terminalreporter.write_line(f"calls of kernels on {torch.cuda.get_device_name()}: {called or 'none'}")


def pytest_sessionfinish(session, exitstatus):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["calls"] = calls
    elif exitstatus == pytest.ExitCode.OK and not any(calls.values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
