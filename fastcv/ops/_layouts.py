"""What is made of weights once and kept: layouts for kernels, sums for phases, convolutions with their norms.

It is used as long as :func:`memory_of` the weights stays the same. Changes in place are counted by torch, and an
assignment to ``.data`` gives a tensor other memory; writing through ``.data`` or NumPy is not noticed. The memory is
held with what was made of it, as other weights at the same address could not be told from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Kept(NamedTuple):
    memory: tuple
    layouts: dict[tuple, Tensor]
    storage: torch.UntypedStorage


kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def memory_of(tensor: Tensor) -> tuple:
    """Equal while a tensor is not changed, given that its storage is held. Not of inference tensors."""
    return tensor._version, tensor.data_ptr(), tensor.shape, tensor.stride()


def kept_layout(weight: Tensor, name: tuple, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """``prepare(weight)``, kept under ``name`` while the weight lives and is not changed."""
    if weight.is_inference():  # counts no changes
        return prepare(weight.detach())
    memory = memory_of(weight)
    entry = kept.get(weight)
    if entry is None or entry[0] != memory:
        entry = kept[weight] = Kept(memory, {}, weight.untyped_storage())
    layout = entry[1].get(name)
    if layout is None:
        with torch.inference_mode(False):  # a layout that is a weight itself must count its changes
            layout = entry[1][name] = prepare(weight.detach())
    return layout
