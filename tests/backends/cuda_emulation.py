"""A pytest plugin: CUDA kernels, run on the host, in the place of the CPU's.

    FASTCV_CUDA_EMULATION=.../cuda_emulation.so python -m pytest -p backends.cuda_emulation tests/ops/test_null.py

So the tests of an operator test its CUDA kernels without a GPU. A run in which none was launched fails.
"""

import ctypes
import os

import pytest
import torch

library = os.environ["FASTCV_CUDA_EMULATION"]


def pytest_configure():
    import fastcv  # noqa: F401  its kernels are registered first

    torch.ops.load_library(library)


def launches() -> int:
    function = ctypes.CDLL(library).fastcv_emulated_launches
    function.restype = ctypes.c_uint64
    return function()


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"launches of CUDA kernels: {launches()}")


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.OK and not launches():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
