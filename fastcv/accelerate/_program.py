"""A part of a model as one call: into ``csrc/program`` on the CPU, of :mod:`_device` on other devices."""

from __future__ import annotations

import operator
import struct
import weakref
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._library import LIBRARY
from ._device import OnDevice
from ._graphs import Graphs
from ._passes import shorten
from ._steps import ACTIVATIONS, CONVOLUTIONS, OPS, Listing, Ref, Step

LIBRARY.define("program_load(int[] code, Tensor[] weights, int precision, bool low_memory) -> int")
LIBRARY.define("program_run(int handle, Tensor[] inputs) -> Tensor[]")
LIBRARY.define("program_free(int handle) -> ()")
LIBRARY.define("program_profile(int handle) -> Tensor")

# In the order of Precision in csrc/conv2d/conv2d_kernels.h.
PRECISIONS = ("default", "highest", "bfloat16", "fast")

_version, _place = operator.attrgetter("_version"), Tensor.data_ptr
_WITH_ACTIVATION = (*CONVOLUTIONS, "add", "mul", "merge", "activate", "affine")


class Settings(NamedTuple):
    """What :func:`fastcv.accelerate` was told."""

    precision: str = "default"  # of PRECISIONS, on the CPU
    low_memory: bool = False
    dtype: torch.dtype = torch.float32  # of maps and weights on other devices
    graphs: bool = False  # on those


DEFAULT = Settings()


_CPU = torch.device("cpu")


class _Loaded:
    """A program in C++ for as long as anybody holds this: a thread may still call one that another replaces."""

    device = _CPU

    def __init__(self, code: list[int], weights: list[Tensor], settings: Settings):
        precision = PRECISIONS.index(settings.precision)
        self.handle = torch.ops.fastcv.program_load(code, weights, precision, settings.low_memory)
        weakref.finalize(self, torch.ops.fastcv.program_free.default, self.handle).atexit = False

    def run(self, *inputs: Tensor) -> list[Tensor]:
        return torch.ops.fastcv.program_run.default(self.handle, inputs)


class _Replayed(NamedTuple):
    """What an :class:`OnDevice` does, as graphs, which go with it when a parameter changes."""

    device: torch.device
    run: Graphs


class ModelState:
    """Parameters as they were. Small networks feel how long it takes to look at them."""

    def __init__(self, refs: list[Ref]):
        by_owner: dict[int, tuple[dict, list[str]]] = {}
        for r in refs:
            by_owner.setdefault(id(r.owner), (r.owner, []))[1].append(r.name)
        # Of a single name itemgetter gives no tuple: the name twice does.
        self._owners = [(o, operator.itemgetter(*(n if len(n) > 1 else 2 * n))) for o, n in by_owner.values()]
        self._tensors = self._now()
        # Held, so that nothing else can come to lie there: an assignment to `.data` counts as no change.
        self._storages = [t.untyped_storage() for t in self._tensors]
        self._versions, self._places = list(map(_version, self._tensors)), list(map(_place, self._tensors))

    def _now(self) -> list[Tensor]:
        return [t for owner, names in self._owners for t in names(owner) if t is not None]

    def changed(self) -> bool:
        """Whether a parameter is another, was written to, or lies elsewhere."""
        now = self._now()
        return (
            len(now) != len(self._tensors)
            or not all(map(operator.is_, now, self._tensors))
            or list(map(_version, now)) != self._versions
            or list(map(_place, now)) != self._places
        )


class Program(nn.Module):
    """Calls a program, which is loaded when first called, and again after one of its parameters has changed or where
    inputs are on another device."""

    def __init__(self, listing: Listing, settings: Settings = DEFAULT):
        super().__init__()
        self.settings = settings
        self.taken = shorten(listing)
        self.listing = listing
        self.convolutions = sum(step.op in CONVOLUTIONS for step in listing.steps)
        self._refs = list({r.key: r for step in listing.steps for r in step.refs()}.values())
        self._latest: tuple[_Loaded | OnDevice | _Replayed, ModelState] | None = None
        self._lock = Lock()

    def forward(self, *inputs: Tensor) -> list[Tensor] | tuple[Tensor, ...]:
        latest, device = self._latest, inputs[0].device
        for x in inputs[1:]:
            if x.device != device:
                raise RuntimeError(f"inputs: expected them on one device, got {device} and {x.device}")
        if latest is None or latest[0].device != device or latest[1].changed():
            with self._lock:  # of several threads one loads it
                latest = self._latest
                if latest is None or latest[0].device != device or latest[1].changed():
                    latest = self._latest = None  # the old one goes before the new one comes
                    latest = self._latest = self._load(device)
        return latest[0].run(*inputs)

    def _load(self, device: torch.device) -> tuple[_Loaded | OnDevice | _Replayed, ModelState]:
        state = ModelState(self._refs)  # before they are read: what changes meanwhile is seen at the next call
        for r in self._refs:
            weight = r.get()
            if weight is not None and weight.device != device:
                raise RuntimeError(f"{r.name}: expected on {device}, where the inputs are, got {weight.device}")
        return self._load_on_cpu() if device.type == "cpu" else self._load_by_calls(device), state

    def _load_by_calls(self, device: torch.device) -> OnDevice | _Replayed:
        on_cuda = device.type == "cuda"
        if on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("weights cannot be laid out while a CUDA graph is recorded: call the model once before")
        loaded = OnDevice(self.listing, device, self.settings.dtype)
        if on_cuda:
            torch.cuda.current_stream(device).synchronize()  # other threads may read the weights on other streams
        return _Replayed(device, Graphs(loaded.run)) if self.settings.graphs else loaded

    def _load_on_cpu(self) -> _Loaded:
        numbers: dict[tuple, int] = {}
        weights: list[Tensor] = []
        code = [len(self.listing.inputs), *self.listing.inputs, self.listing.values]
        code += [len(self.listing.outputs), *(v for v, _ in self.listing.outputs)]
        code += [len(self.listing.outputs), *(rank for _, rank in self.listing.outputs), len(self.listing.steps)]
        with torch.no_grad():
            for step in self.listing.steps:
                indices = []
                for named in step.tensors():
                    if named is not None and named[0] not in numbers:
                        numbers[named[0]] = len(weights)
                        weights.append(named[1])
                    indices.append(-1 if named is None else numbers[named[0]])
                params = _params(step)
                code += [OPS.index(step.op), step.output, len(step.inputs), *step.inputs]
                code += [len(params), *params, len(indices), *indices]
            return _Loaded(code, weights, self.settings)

    @property
    def place(self) -> str:
        """Where and how it ran, if not on the CPU."""
        latest = self._latest
        if latest is None or latest[0].device == _CPU:
            return ""
        name = str(self.settings.dtype).removeprefix("torch.")
        return f"{latest[0].device} in {name}{', as graphs' if self.settings.graphs else ''}"

    def reload(self) -> None:
        """Plan again at the next call, with other choices of kernels."""
        self._latest = None

    def __getstate__(self):
        """A copy loads its own: its parameters are others."""
        return {**self.__dict__, "_latest": None, "_lock": None}

    def __setstate__(self, state):
        super().__setstate__({**state, "_lock": Lock()})

    def profile(self, *inputs: Tensor, repeat: int = 10) -> Tensor:
        """A row for each step: what it did and its nanoseconds, the median of ``repeat`` calls (see ``program_profile``
        in csrc/program), on the CPU."""
        if not inputs[0].is_cpu:
            raise RuntimeError(
                f"inputs: expected on the CPU, whose programs are measured step by step, got {inputs[0].device}"
            )
        self(*inputs)
        handle = self._latest[0].handle
        torch.ops.fastcv.program_profile(handle)
        tables = []
        for _ in range(repeat):
            self(*inputs)
            tables.append(torch.ops.fastcv.program_profile(handle))
        table = tables[0].clone()
        table[:, 2] = torch.stack([t[:, 2] for t in tables]).median(0).values
        return table


def _params(step: Step) -> list[int]:
    params = (
        []
        if step.op in ("add", "mul", "merge")
        else [_bits(p) if isinstance(p, float) else int(p) for p in step.params]
    )
    if step.op in _WITH_ACTIVATION:
        params += [ACTIVATIONS.index(step.activation), _bits(step.slope)]
    return params


def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]
