"""A part of a model as one call into ``csrc/program``."""

from __future__ import annotations

import operator
import struct
import weakref

import torch
from torch import Tensor, nn

from .._library import LIBRARY
from ._passes import shorten
from ._steps import ACTIVATIONS, CONVOLUTIONS, OPS, Listing, Step

LIBRARY.define("program_load(int[] code, Tensor[] weights, int precision) -> int")
LIBRARY.define("program_run(int handle, Tensor[] inputs) -> Tensor[]")
LIBRARY.define("program_free(int handle) -> ()")
LIBRARY.define("program_profile(int handle) -> Tensor")

# In the order of Precision in csrc/conv2d/conv2d_kernels.h.
PRECISIONS = ("default", "highest", "bfloat16", "fast")

_version, _place = operator.attrgetter("_version"), Tensor.data_ptr
_WITH_ACTIVATION = (*CONVOLUTIONS, "add", "mul", "activate", "affine")


class Program(nn.Module):
    """Calls a program, which is loaded when first called and again after one of its parameters has changed."""

    def __init__(self, listing: Listing, precision: str = "default"):
        super().__init__()
        self.precision = precision
        self.taken = shorten(listing)
        self.listing = listing
        self.convolutions = sum(step.op in CONVOLUTIONS for step in listing.steps)
        self._refs = list({r.key: r for step in listing.steps for r in step.refs()}.values())
        self._handle: int | None = None
        self._free: weakref.finalize | None = None
        self._state: tuple[list, list, list] = ([], [], [])
        self._owners: list[tuple[dict, operator.itemgetter]] = []

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        if self._handle is None or self._changed():
            self._load()
        return torch.ops.fastcv.program_run.default(self._handle, inputs)

    def _changed(self) -> bool:
        """Whether a parameter is another, was written to, or lies elsewhere. Small networks feel how long it takes."""
        tensors, versions, places = self._state
        now = [t for owner, names in self._owners for t in names(owner) if t is not None]
        return (
            len(now) != len(tensors)
            or not all(map(operator.is_, now, tensors))
            or list(map(_version, now)) != versions
            or list(map(_place, now)) != places
        )

    def _note_state(self) -> None:
        by_owner: dict[int, tuple[dict, list[str]]] = {}
        for r in self._refs:
            by_owner.setdefault(id(r.owner), (r.owner, []))[1].append(r.name)
        # Of a single name itemgetter gives no tuple: the name twice does.
        self._owners = [(o, operator.itemgetter(*(n if len(n) > 1 else 2 * n))) for o, n in by_owner.values()]
        tensors = [t for owner, names in self._owners for t in names(owner) if t is not None]
        self._state = tensors, list(map(_version, tensors)), list(map(_place, tensors))

    def _load(self) -> None:
        self._unload()
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
            self._note_state()
            self._handle = torch.ops.fastcv.program_load(code, weights, PRECISIONS.index(self.precision))
        self._free = weakref.finalize(self, torch.ops.fastcv.program_free.default, self._handle)
        self._free.atexit = False

    def reload(self) -> None:
        """Plan again at the next call, with other choices of kernels."""
        self._unload()

    def _unload(self) -> None:
        if self._handle is not None:
            self._free()
            self._handle = None

    def __getstate__(self):
        """A copy loads its own: its parameters are others."""
        return {**self.__dict__, "_handle": None, "_free": None, "_state": ([], [], []), "_owners": []}

    def profile(self, *inputs: Tensor, repeat: int = 10) -> Tensor:
        """A row for each step: what it did and its nanoseconds, the median of ``repeat`` calls (see ``program_profile``
        in csrc/program)."""
        self(*inputs)
        torch.ops.fastcv.program_profile(self._handle)
        tables = []
        for _ in range(repeat):
            self(*inputs)
            tables.append(torch.ops.fastcv.program_profile(self._handle))
        table = tables[0].clone()
        table[:, 2] = torch.stack([t[:, 2] for t in tables]).median(0).values
        return table


def _params(step: Step) -> list[int]:
    params = [] if step.op in ("add", "mul") else [_bits(p) if isinstance(p, float) else int(p) for p in step.params]
    if step.op in _WITH_ACTIVATION:
        params += [ACTIVATIONS.index(step.activation), _bits(step.slope)]
    return params


def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]
