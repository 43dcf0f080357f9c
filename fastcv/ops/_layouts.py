"""What is made of weights once and kept: layouts for kernels, sums for phases, convolutions with their norms.

It is used as long as :func:`memory_of` the weights stays the same. Changes in place are counted by torch, and an
assignment to ``.data`` gives a tensor other memory; writing through ``.data`` or NumPy is not noticed. The memory is
held with what was made of it, as other weights at the same address could not be told from it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    weight: weakref.ref
    memory: tuple
    layouts: dict[tuple, Tensor]
    storage: torch.UntypedStorage


# By the weight's id: to look into torch's WeakTensorKeyDictionary takes a sixth of a small layer's call.
kept: dict[int, Kept] = {}


def _keep(weight: Tensor, memory: tuple) -> Kept:
    number = id(weight)

    def forget(ref: weakref.ref) -> None:
        entry = kept.get(number)
        if entry is not None and entry.weight is ref:
            del kept[number]

    entry = kept[number] = Kept(weakref.ref(weight, forget), memory, {}, weight.untyped_storage())
    return entry


def memory_of(tensor: Tensor) -> tuple:
    """Equal while a tensor is not changed, given that its storage is held. Not of inference tensors."""
    return tensor._version, tensor.data_ptr(), tensor.shape, tensor.stride()


def kept_layout(weight: Tensor, name: tuple, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """``prepare(weight)``, kept under ``name`` while the weight lives and is not changed."""
    if weight.is_inference():  # counts no changes
        return prepare(weight.detach())
    memory = memory_of(weight)
    entry = kept.get(id(weight))
    if entry is None or entry[0]() is not weight or entry[1] != memory:
        entry = _keep(weight, memory)
    layout = entry[2].get(name)
    if layout is None:
        with torch.inference_mode(False):  # a layout that is a weight itself must count its changes
            layout = entry[2][name] = prepare(weight.detach())
    return layout
