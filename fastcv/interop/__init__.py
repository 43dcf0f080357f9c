"""Makes other packages run on fastcv's operators: ``patch``, ``unpatch``, ``patched``.

Each package has one module here with two functions: ``apply()`` re-points its operators and returns
an object that says what was re-pointed and undoes it, and nothing else. Patching is process-wide.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator
from typing import Protocol

from .._library import PATCHED

PACKAGES = ("torchvision",)


class Applied(Protocol):
    """What ``apply()`` of a package's module returns."""

    report: dict[str, list[str]]

    def undo(self) -> None: ...


class _State:
    """One package: live while ``patch`` asked for it or a ``patched`` block is open."""

    def __init__(self) -> None:
        self.asked = False
        self.blocks = 0
        self.applied: Applied | None = None

    def update(self, package: str) -> None:
        wanted = self.asked or self.blocks > 0
        if wanted and self.applied is None:
            self.applied = importlib.import_module(f".{package}", __name__).apply()
            PATCHED[package] = self.applied.report
        elif not wanted and self.applied is not None:
            applied, self.applied = self.applied, None
            del PATCHED[package]
            applied.undo()


_states = {package: _State() for package in PACKAGES}
_lock = threading.RLock()


def _state(package: str) -> _State:
    if package not in _states:
        known = ", ".join(repr(name) for name in PACKAGES)
        raise ValueError(f"package: expected one of {known}, got {package!r}")
    return _states[package]


def patch(package: str) -> None:
    """Make every caller of ``package``'s operators in this process run fastcv's kernels.

    No change of code is needed: models of the package itself, other libraries built on it,
    TorchScript and C++ callers all reach the operators through PyTorch's dispatcher, where they are
    re-pointed. Only operators that have a compiled kernel here are; :func:`fastcv.build_info`
    (``"patched"``) and ``python -m fastcv info`` show which. Calling it twice is the same as once.
    It works for tensors that need gradients (first and second derivatives and forward mode are
    fastcv's), under ``torch.inference_mode``, ``torch.autocast`` and ``torch.compile``. Each change
    between patched and unpatched resets what ``torch.compile`` has cached, so compiled functions
    follow it: patch once at the start of a program, not around every call.

    Args:
        package: ``"torchvision"``. What then differs from the package's own behaviour stands in the
            documentation of :mod:`fastcv.interop.torchvision`.

    Raises:
        ValueError: an unknown package.
        ImportError: the package is not installed.

    Example:
        >>> import fastcv
        >>> fastcv.patch("torchvision")
        >>> fastcv.unpatch("torchvision")
    """
    with _lock:
        state = _state(package)
        before, state.asked = state.asked, True
        try:
            state.update(package)
        except BaseException:
            state.asked = before
            raise


def unpatch(package: str) -> None:
    """Undo :func:`patch`: the package's own operators answer again. Without a patch it does
    nothing.

    Args:
        package: as for :func:`patch`. Blocks of :func:`patched` that are still open keep the patch
        until they end.

    Raises:
        ValueError: an unknown package.

    Example:
        >>> import fastcv
        >>> fastcv.patch("torchvision")
        >>> fastcv.unpatch("torchvision")
        >>> fastcv.build_info()["patched"]
        {}
    """
    with _lock:
        state = _state(package)
        state.asked = False
        state.update(package)


@contextlib.contextmanager
def patched(package: str) -> Iterator[None]:
    """:func:`patch` for the length of a ``with`` block; blocks may be nested, and end in any order.

    Args:
        package: as for :func:`patch`.

    Raises:
        ValueError, ImportError: as :func:`patch`.

    Example:
        >>> import fastcv
        >>> with fastcv.patched("torchvision"):
        ...     print(list(fastcv.build_info()["patched"]))
        ['torchvision']
    """
    with _lock:
        state = _state(package)
        state.blocks += 1
        try:
            state.update(package)
        except BaseException:
            state.blocks -= 1
            raise
    try:
        yield
    finally:
        with _lock:
            state.blocks -= 1
            state.update(package)
