"""The ``reduction`` argument of the losses."""

from __future__ import annotations

import torch
from torch import Tensor


def check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")


def reduce_loss(loss: Tensor, reduction: str) -> Tensor:
    """The mean of no losses is 0, so that an image without objects does not make a loss NaN."""
    if reduction == "none":
        return loss
    total = loss.sum(dtype=torch.promote_types(loss.dtype, torch.float32))
    if reduction == "mean":
        total = total / torch.sym_max(loss.numel(), 1)
    return total.to(loss.dtype)
