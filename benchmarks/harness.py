"""How everything here is timed: contenders must agree, then take turns in one process.

A case is one operator at one shape with its contenders; each benchmark file supplies a list of
cases.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

import fastcv

Thunk = Callable[[], Any]
MINIMUM_SAMPLE = 2e-3  # seconds; shorter calls are repeated within a sample
LONG_CALL = 20e-3  # seconds; in longer ones it matters little what the caches held
MOST_ROUNDS = 60


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        operator: its name in ``fastcv.ops``.
        shape: what is computed, in words; with the operator it names the case.
        inputs: builds the arguments, from a fixed seed.
        contenders: name -> ``prepare(*inputs)``, which returns the function to time. The first is
            fastcv's; of the others the fastest not named fastcv is the baseline that the ratio refers to.
        tolerance: relative and absolute, between the results of contenders.
        agree: ``(result, expected)`` raises where they differ; expected is the second contender's.
        quick: whether ``--quick`` runs it.
    """

    operator: str
    shape: str
    inputs: Callable[[], tuple]
    contenders: dict[str, Callable[..., Thunk]]
    tolerance: float = 1e-4
    agree: Callable[[Any, Any], None] | None = None
    quick: bool = True

    @property
    def name(self) -> str:
        return f"{self.operator}: {self.shape}"

    def prepare(self, device: str = "cpu") -> dict[str, Thunk]:
        """The functions to time, after they gave the same results."""
        inputs = tree_map_only(torch.Tensor, lambda x: _moved(x, device), self.inputs())
        thunks = {name: prepare(*inputs) for name, prepare in self.contenders.items()}
        results = {name: thunk() for name, thunk in thunks.items()}
        _, expected, *_ = results
        for name, result in results.items():
            if name != expected:
                self._compare(name, result, results[expected])
        return thunks

    def _compare(self, name: str, result, expected) -> None:
        try:
            if self.agree is not None:
                self.agree(result, expected)
            else:
                torch.testing.assert_close(result, expected, rtol=self.tolerance, atol=self.tolerance, equal_nan=True)
        except AssertionError as error:
            raise AssertionError(f"{self.name}: {name} disagrees with the second contender: {error}") from error


def _moved(x: torch.Tensor, device: str) -> torch.Tensor:
    return x if x.device.type == device else x.detach().to(device).requires_grad_(x.requires_grad)


def forward(function: Callable) -> Callable[..., Thunk]:
    """Times ``function(*inputs)``, without gradients."""

    def prepare(*inputs) -> Thunk:
        def call():
            with torch.no_grad():
                return function(*inputs)

        return call

    return prepare


def backward(function: Callable) -> Callable[..., Thunk]:
    """Times the gradients of ``function(*inputs)`` for the inputs that need them."""

    def prepare(*inputs) -> Thunk:
        output = function(*inputs)
        gradient = torch.ones_like(output)
        wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
        return lambda: torch.autograd.grad(output, wanted, gradient, retain_graph=True)

    return prepare


# ---- timing --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds for one call: median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        cuts = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), cuts[1], cuts[7], len(samples))


def _sample(thunk: Thunk, calls: int, warm: bool = False) -> float:
    if warm:
        thunk()
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        thunk()
    wait()
    return (time.perf_counter() - start) / calls


def measure(thunks: dict[str, Thunk], budget: float, least_rounds: int) -> dict[str, Times]:
    """Times each function once a round, for about ``budget`` seconds.

    In another order each time, and after a call that is not timed: who comes after one that filled the caches with its
    own data would be slower.
    """
    calls, warm, cost = {}, {}, 0.0
    for name, thunk in thunks.items():
        _sample(thunk, 1)  # warm-up: caches, allocator, thread pool
        seconds = _sample(thunk, 1)
        calls[name] = max(1, round(MINIMUM_SAMPLE / max(seconds, 1e-7)))
        warm[name] = seconds < LONG_CALL
        cost += seconds * (calls[name] + warm[name])
    if cost > budget / 3:
        least_rounds = min(least_rounds, 4)  # a round of seconds is not noisy
    rounds = min(MOST_ROUNDS, max(least_rounds, int(budget / cost)))
    samples: dict[str, list[float]] = {name: [] for name in thunks}
    shuffle, turns = random.Random(0).shuffle, list(thunks.items())
    for _ in range(rounds):
        shuffle(turns)
        for name, thunk in turns:
            samples[name].append(_sample(thunk, calls[name], warm[name]))
    return {name: Times.of(taken) for name, taken in samples.items()}


@dataclasses.dataclass(frozen=True)
class Result:
    """One case, measured."""

    operator: str
    shape: str
    times: dict[str, Times]

    @property
    def baseline(self) -> str:
        """The fastest contender that is not fastcv: torch in its better memory format, say."""
        others = [name for name in self.times if not name.startswith("fastcv")]
        return min(others, key=lambda name: self.times[name].median)

    @property
    def ratio(self) -> float:
        """How many times faster fastcv is than the baseline; below 1 it is slower."""
        ours, *_ = self.times.values()
        return self.times[self.baseline].median / ours.median


def run(cases: list[Case], *, quick: bool, device: str = "cpu") -> Iterator[Result]:
    budget, least_rounds = (0.4, 3) if quick else (0.7 if device == "cuda" else 3.0, 7)  # a GPU's times vary little
    for case in cases:
        if quick and not case.quick:
            continue
        thunks = case.prepare(device)
        yield Result(case.operator, case.shape, measure(thunks, budget, least_rounds))


# ---- where and with what -------------------------------------------------------------------------


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a measurement depends on."""
    from importlib.metadata import version

    info = fastcv.build_info()
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "processor": _processor() if device == "cpu" else torch.cuda.get_device_name(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": len(_affinity()),
        "threads": torch.get_num_threads(),
        "cpu_isa": info["cpu_isa"],
        "compiler": info["compiler"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "fastcv": fastcv.__version__,
    }


def _affinity():
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


# ---- pytest-benchmark ----------------------------------------------------------------------------


def as_test(cases: list[Case]):
    """A test function for pytest-benchmark: one group per case, one benchmark per contender."""
    import pytest

    parameters = [
        pytest.param(case, contender, id=f"{case.shape}-{contender}") for case in cases for contender in case.contenders
    ]
    prepared: dict[str, dict[str, Thunk]] = {}

    @pytest.mark.parametrize(("case", "contender"), parameters)
    def test(benchmark, case, contender):
        if case.name not in prepared:
            prepared.clear()  # one case's tensors at a time
            prepared[case.name] = case.prepare()
        benchmark.group = case.name
        benchmark(prepared[case.name][contender])

    return test
