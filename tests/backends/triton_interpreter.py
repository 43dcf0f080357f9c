"""A pytest plugin: Triton's kernels, in its interpreter, in the place of the CPU's.

    TRITON_INTERPRET=1 python -m pytest -p backends.triton_interpreter tests/ops/test_null.py

So the tests of an operator test its Triton kernels without a GPU. A run in which none of them was called fails.
"""

import functools
import os

import numpy as np
import pytest
import torch

calls: dict[str, int] = {}


def pytest_configure():
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before triton is imported"
    from fastcv import _library

    for name in _library.TRITON:
        calls[name] = 0
        _library.LIBRARY.impl(name, _counted(name, _library.triton_kernel(name)), "CPU", allow_override=True)
    _speed_up_interpreter()
    _round_bfloat16()


def _speed_up_interpreter():
    """Leaves out half of its time: what it does again at every call of a function in a kernel and for every value, and
    whether 32-bit numbers overflow, which it says only where debug is set."""
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch(function)
        return interpreter._LangPatchScope()  # which restores nothing

    pointer, of_scalar = np.dtype(np.uint64), functools.cache(interpreter._get_np_dtype)
    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = lambda type: pointer if type.scalar.is_ptr() else of_scalar(type.scalar)
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


def _round_bfloat16():
    """float32 is rounded to the nearest bfloat16, as devices do it: the interpreter cuts."""
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(input, input_type, output_type, rounding_mode):
        if (input_type, output_type) != (tl.float32, tl.bfloat16):
            return convert(input, input_type, output_type, rounding_mode)
        return torch.tensor(input).bfloat16().view(torch.int16).numpy()

    interpreter._convert_float = converted


def _counted(name, kernel):
    def run(*args, **kwargs):
        calls[name] += 1
        return kernel(*args, **kwargs)

    return run


def pytest_terminal_summary(terminalreporter):
    called = ", ".join(f"{name} {count}" for name, count in calls.items() if count)
    terminalreporter.write_line(f"calls of Triton kernels: {called or 'none'}")


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.OK and not any(calls.values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
