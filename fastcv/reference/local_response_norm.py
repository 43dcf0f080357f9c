"""Local response normalisation in plain PyTorch: the specification of ``csrc/local_response_norm``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_sum(x: Tensor, size: int, mirrored: bool = False) -> Tensor:
    """``sum(x[:, c - size // 2 : c + (size - 1) // 2 + 1])`` for each channel c; mirrored: before and after swapped."""
    before, after = size // 2, (size - 1) // 2
    padded = F.pad(x, (0, 0, 0, 0, after, before) if mirrored else (0, 0, 0, 0, before, after))
    return padded.unfold(1, size, 1).sum(-1)


def _accumulated(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _as(result: Tensor, input: Tensor) -> Tensor:
    return result.to(input.dtype).contiguous(memory_format=torch._prims_common.suggest_memory_format(input))


def local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    x = _accumulated(input)
    return _as(x * (k + alpha / size * window_sum(x * x, size)) ** -beta, input)


def gradient(grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Of differentiable operations."""
    d = k + alpha / size * window_sum(x * x, size)
    power = d**-beta
    return grad * power - 2 * alpha / size * beta * x * window_sum(grad * x * power / d, size, mirrored=True)


def local_response_norm_backward(grad: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return _as(gradient(_accumulated(grad), _accumulated(input), size, alpha, beta, k), input)
