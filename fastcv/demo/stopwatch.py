"""Times operators inside other people's code, and the same run with and without the patch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import fastcv

Where = Sequence[tuple[ModuleType, str]]


@dataclasses.dataclass
class Run:
    """One run of a pipeline: seconds in all, and seconds and calls of each operator watched."""

    total: float = 0.0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    calls: dict[str, int] = dataclasses.field(default_factory=dict)
    result: Any = None

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.calls[name] = self.calls.get(name, 0) + 1


@contextlib.contextmanager
def watching(where: Where, run: Run) -> Iterator[None]:
    """Times every call of the functions at ``(module, name)``."""
    originals = [(module, name, getattr(module, name)) for module, name in where]

    def timed(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                run.add(name.lstrip("_"), time.perf_counter() - start)

        return call

    for module, name, function in originals:
        setattr(module, name, timed(name, function))
    try:
        yield
    finally:
        for module, name, function in originals:
            setattr(module, name, function)


def time_once(pipeline: Callable[[], Any], where: Where) -> Run:
    run = Run()
    with watching(where, run):
        start = time.perf_counter()
        run.result = pipeline()
        run.total = time.perf_counter() - start
    return run


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs of one pipeline as it is and patched, which took turns."""

    plain: list[Run]
    patched: list[Run]

    def table(self) -> str:
        """Median milliseconds: each operator, the rest, all."""
        names = list(self.plain[0].seconds)
        lines = [f"  {'':<34}{'as it is':>12}{'patched':>12}{'faster':>9}"]
        for name in names:
            what = f"{name} ({self.plain[0].calls[name]} calls)"
            lines.append(self._row(what, lambda run, name=name: run.seconds[name]))
        lines.append(self._row("the rest", lambda run: run.total - sum(run.seconds.values())))
        lines.append(self._row("in all", lambda run: run.total))
        return "\n".join(lines)

    def _row(self, what: str, seconds: Callable[[Run], float]) -> str:
        plain, patched = (statistics.median(map(seconds, r)) for r in (self.plain, self.patched))
        ratio = f"{plain / patched:.2f}x" if patched > 0 else ""
        return f"  {what:<34}{plain * 1e3:>9.1f} ms{patched * 1e3:>9.1f} ms{ratio:>9}"


def compare(pipeline: Callable[[], Any], where: Where, rounds: int) -> Comparison:
    """Runs ``pipeline`` as it is and patched by turns, after one run of each to warm up."""
    plain, patched = [], []
    for number in range(rounds + 1):
        first = time_once(pipeline, where)
        with fastcv.patched("torchvision"):
            second = time_once(pipeline, where)
        if number > 0:
            plain.append(first)
            patched.append(second)
    return Comparison(plain, patched)
