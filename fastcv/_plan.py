"""Which of two kernels serves a call on a GPU, Triton's or the other: measured once for calls alike, and remembered.

The other is torch's or a compiled one. With ``FASTCV_TRITON=plan`` an operator that has both runs them by turns when it
first meets a call of its kind, checks that their results agree, and keeps the faster from then on, in this process and,
by a file for each GPU and set of versions, in others. Calls are of one kind where sizes of maps and batches agree in
their three leading bits; channels, weights, memory formats, types and torch's settings of precision must be the same.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import json
import math
import os
import statistics
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ._files import replacing

Thunk = Callable[[], object]
_ROUNDS = 7
_CALLS = 10  # of a round
_EXACT = ("weight", "bias", "prepared")
# Of the largest: products of half types and of TF32, rounded in another order.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Choice(NamedTuple):
    ours: bool
    triton: float | None
    """Seconds for one call; None where Triton's kernel failed or disagreed."""
    other: float


# ---- which calls are alike -----------------------------------------------------------------------

_in_graphs: contextvars.ContextVar[bool] = contextvars.ContextVar("in_graphs", default=False)


@contextlib.contextmanager
def for_graphs() -> Iterator[None]:
    """Calls in here will be replayed in CUDA graphs: what the host takes to launch them does not count."""
    token = _in_graphs.set(True)
    try:
        yield
    finally:
        _in_graphs.reset(token)


def _signature(value):
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_signature, value)) if isinstance(value, (list, tuple)) else value


def _settings() -> tuple:
    backends = torch.backends
    precision = backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision
    return *precision, backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled(), _in_graphs.get()


def rounded(n: int) -> int:
    """Up to a number of three leading bits: 56, 64, 80, 96, 112, 128, ..."""
    step = 1 << max(n.bit_length() - 3, 0)
    return -(-n // step) * step


def kind(name: str, parameters: list[str], args) -> str:
    """What calls alike share, as text."""

    def text(value, exact: bool) -> str:
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(text(v, exact) for v in value) + "]"
        if not isinstance(value, Tensor):
            return str(value)
        sizes = list(value.shape)
        if value.dim() == 4 and not exact:
            sizes = [n if i == 1 else rounded(n) for i, n in enumerate(sizes)]
        layout = torch._prims_common.suggest_memory_format(value)
        vectors = math.gcd(math.prod(value.shape[2:]), 16 // value.dtype.itemsize)  # of contiguous maps
        last = "channels_last" if layout == torch.channels_last else f"contiguous/{vectors}"
        return f"{'x'.join(map(str, sizes))} {str(value.dtype).removeprefix('torch.')} {last}"

    named = zip(parameters, args, strict=False)  # defaults are not given
    called = ", ".join(f"{p}={text(value, p in _EXACT)}" for p, value in named)
    return f"{name}({called}) {' '.join(map(str, _settings()))}"


# ---- plans ---------------------------------------------------------------------------------------


class Plan:
    """Choices on one kind of device, as ``file`` has them."""

    def __init__(self, file: Path, seconds: Callable[[dict[str, Thunk]], dict[str, float]]):
        """``seconds(thunks)``: how long each takes."""
        self.file, self._seconds = file, seconds
        self._lock = threading.RLock()
        self.choices = self._read()

    def _read(self) -> dict[str, Choice]:
        try:
            stored = json.loads(self.file.read_text())
            choices = {key: Choice(*c) for key, c in stored.items()}
            valid = all(type(c.ours) is bool and c.other > 0 and (c.triton or 1) > 0 for c in choices.values())
        except OSError:  # there is none yet
            return {}
        except (ValueError, TypeError, AttributeError):
            valid = False
        if not valid:
            warnings.warn(f"{self.file} holds no choices of kernels; they are measured again", RuntimeWarning, 2)
            return {}
        return choices

    def choose(self, key: str, ours: Thunk, theirs: Thunk) -> Choice:
        with self._lock:  # of several threads one measures
            choice = self.choices.get(key)
            if choice is None:
                choice = self.choices[key] = self._measure(key, ours, theirs)
                self._save()
            return choice

    def _measure(self, key: str, ours: Thunk, theirs: Thunk) -> Choice:
        expected = theirs()  # what is wrong with the call is raised here
        try:
            problem = _difference(ours(), expected)
        except Exception as error:  # of a compiler, or a device that it does not know
            problem = f"fails ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        if problem:
            warnings.warn(f"Triton's kernel {problem}, the other is used: {key}", RuntimeWarning, 2)
        times = self._seconds({"other": theirs} if problem else {"triton": ours, "other": theirs})
        triton = times.get("triton")
        return Choice(triton is not None and triton < times["other"], triton, times["other"])

    def _save(self) -> None:
        """With what other processes found meanwhile."""
        try:
            self.choices = {**self._read(), **self.choices}
            with replacing(self.file) as temporary:
                temporary.write_text(json.dumps(self.choices, indent=0, sort_keys=True) + "\n")
        except OSError as error:
            warnings.warn(f"{self.file}: choices of kernels are not kept ({error})", RuntimeWarning, 2)


def _difference(result, expected) -> str:
    """What is wrong with a result; empty where nothing is."""
    pairs = zip(*([r] if isinstance(r, Tensor) else r for r in (result, expected)), strict=True)
    for r, e in pairs:
        if r.shape != e.shape or r.dtype != e.dtype:
            return f"gives {tuple(r.shape)} in {r.dtype} instead of {tuple(e.shape)} in {e.dtype}"
        if not r.numel():
            continue
        rows = zip(r.detach().unbind(), e.detach().unbind(), strict=True) if r.dim() else [(r, e)]
        error, size = torch.stack([_distance(*row) for row in rows]).amax(0).tolist()
        if not error <= _TOLERANCE[e.dtype] * size:
            return f"differs by {error / max(size, 1e-30):.1e} of the largest result"
    return ""


def _distance(result: Tensor, expected: Tensor) -> Tensor:
    """The largest difference and the largest expected number. Where the latter is not finite, kernels may differ."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    result, expected = result.to(wide), expected.to(wide)
    difference = (result - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return torch.stack([torch.where(expected.isfinite(), x, 0).max() for x in (difference, expected.abs())])


# ---- on a GPU ------------------------------------------------------------------------------------


def gpu_seconds(thunks: dict[str, Thunk]) -> dict[str, float]:
    """Medians of rounds by turns. As the host launches them, or in graphs where they will be in graphs."""
    runs = {name: _in_graph(thunk) if _in_graphs.get() else _many(thunk) for name, thunk in thunks.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _, (name, run) in itertools.product(range(_ROUNDS + 1), runs.items()):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        samples[name].append(start.elapsed_time(end) * 1e-3 / _CALLS)
    return {name: statistics.median(taken[1:]) for name, taken in samples.items()}


def _many(thunk: Thunk) -> Thunk:
    def run():
        for _ in range(_CALLS):
            thunk()

    return run


def _in_graph(thunk: Thunk) -> Thunk:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads go on
        _many(thunk)()
    return graph.replay


_plans: dict[torch.device, Plan] = {}


def plan_for(device: torch.device) -> Plan:
    """Of the GPU ``device``; GPUs of one kind share a file."""
    if device not in _plans:
        import triton

        from . import __version__

        versions = f"fastcv-{__version__}_torch-{torch.__version__}_triton-{triton.__version__}"
        name = f"{torch.cuda.get_device_name(device)}_{versions}".replace(" ", "-").replace("/", "-")
        _plans[device] = Plan(cache_folder() / f"{name}.json", gpu_seconds)
    return _plans[device]


def known_choices() -> dict[str, Choice]:
    """Of the devices that this process has used."""
    return {key: choice for plan in _plans.values() for key, choice in plan.choices.items()}


def cache_folder() -> Path:
    """``FASTCV_CACHE``, or ``fastcv`` where the system keeps caches."""
    given = os.environ.get("FASTCV_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastcv"


def planned(name: str, ours: Callable, theirs: Callable, plan_of: Callable[[torch.device], Plan] = plan_for):
    """``fastcv::name`` by plan. While a graph is captured nothing is measured: the other serves what is not known."""
    seen: dict[tuple, bool] = {}
    parameters: list[str] = []

    def run(*args):
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        signature = first.device, _signature(args), _settings()
        use_ours = seen.get(signature)
        if use_ours is None:
            if not parameters:
                parameters.extend(a.name for a in getattr(torch.ops.fastcv, name).default._schema.arguments)
            plan, key = plan_of(first.device), kind(name, parameters, args)
            if key not in plan.choices and torch.cuda.is_current_stream_capturing():
                return theirs(*args)
            if len(seen) >= 4096:
                seen.clear()
            use_ours = seen[signature] = plan.choose(key, lambda: ours(*args), lambda: theirs(*args)).ours
        return ours(*args) if use_ours else theirs(*args)

    return run
