"""A pytest plugin: Triton's kernels, in its interpreter, in the place of the CPU's.

    TRITON_INTERPRET=1 python -m pytest -p backends.triton_interpreter tests/ops/test_null.py

So the tests of an operator test its Triton kernels without a GPU. A run in which none of them was called fails.
"""

import os

import pytest

calls: dict[str, int] = {}


def pytest_configure():
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before triton is imported"
    from triton.runtime import interpreter

    from fastcv import _library

    # Half of its time went into whether 32-bit numbers overflow, which it only says where debug is set, and into
    # patching the language at each call of a function, which the kernel's launch has done for ours.
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
    call = interpreter.InterpretedFunction.__call__

    def call_or_run(self, *args, **kwargs):
        ours = self.fn.__module__.startswith("fastcv.")
        return self.rewrite()(*args, **kwargs) if ours else call(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_or_run
    for name in _library.TRITON:
        calls[name] = 0
        _library.LIBRARY.impl(name, _counted(name, _library.triton_kernel(name)), "CPU", allow_override=True)


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
