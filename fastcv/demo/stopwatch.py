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
    """Runs of one pipeline in several ways, which took turns; the first way is the pipeline as it is."""

    runs: dict[str, list[Run]]

    def results(self) -> list[tuple[Any, Any]]:
        """The result of every other run beside the first one's."""
        expected = next(iter(self.runs.values()))[0].result
        return [(run.result, expected) for runs in list(self.runs.values())[1:] for run in runs]

    def table(self) -> str:
        """Median milliseconds: each operator, the rest, all; and how much faster the last way is."""
        first = next(iter(self.runs.values()))[0]
        lines = [f"  {'':<34}" + "".join(f"{way:>14}" for way in self.runs) + f"{'faster':>9}"]
        for name in first.seconds:
            what = f"{name} ({first.calls[name]} calls)"
            lines.append(self._row(what, lambda run, name=name: run.seconds.get(name)))
        lines.append(self._row("the rest", lambda run: run.total - sum(run.seconds.values())))
        lines.append(self._row("in all", lambda run: run.total))
        return "\n".join(lines)

    def _row(self, what: str, seconds: Callable[[Run], float | None]) -> str:
        """Empty where an operator was not called, for another does its work."""
        cells, medians = [], []
        for runs in self.runs.values():
            times = [seconds(run) for run in runs]
            medians.append(None if None in times else statistics.median(times))
            cells.append(f"{'':>14}" if medians[-1] is None else f"{medians[-1] * 1e3:>11.1f} ms")
        timed = [m for m in medians if m is not None]
        ratio = f"{timed[0] / timed[-1]:.2f}x" if timed[-1] > 0 else ""
        return f"  {what:<34}{''.join(cells)}{ratio:>9}"


def compare(pipeline: Callable[[], Any], accelerated: Callable[[], Any], where: Where, rounds: int) -> Comparison:
    """Runs a pipeline as it is, patched, and accelerated by turns, after one run of each to warm up."""
    runs: dict[str, list[Run]] = {"as it is": [], "patched": [], "accelerated": []}
    for number in range(rounds + 1):
        plain = time_once(pipeline, where)
        with fastcv.patched("torchvision"):
            patched = time_once(pipeline, where)
            fast = time_once(accelerated, where)
        if number > 0:
            for kept, run in zip(runs.values(), (plain, patched, fast), strict=True):
                kept.append(run)
    return Comparison(runs)
