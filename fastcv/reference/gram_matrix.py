"""Gram matrices and style losses in plain PyTorch: the specification of ``csrc/gram_matrix``."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_of(normalize: str, features: Tensor) -> float:
    _, channels, height, width = features.shape
    if channels * height * width == 0:
        return 0.0
    return {"elements": 1 / (channels * height * width), "positions": 1 / (height * width), "none": 1.0}[normalize]


def accumulated(x: Tensor) -> Tensor:
    """In the type in which sums are made."""
    return x if x.dtype == torch.float64 else x.float()


def cross(a: Tensor, b: Tensor, normalize: str) -> Tensor:
    """``scale * A B^T``, ``[N, C, C]``, of two maps ``[N, C, H, W]``."""
    return torch.bmm(accumulated(a).flatten(2) * scale_of(normalize, a), accumulated(b).flatten(2).mT)


def gram_matrix(features: Tensor, normalize: str) -> Tensor:
    return cross(features, features, normalize).to(features.dtype)


def gram_matrix_backward(grad: Tensor, features: Tensor, normalize: str) -> Tensor:
    symmetric = accumulated(grad) + accumulated(grad).mT
    product = torch.bmm(symmetric.to(accumulated(features).dtype), accumulated(features).flatten(2))
    gradient = (product * scale_of(normalize, features)).view(features.shape).to(features.dtype)
    return gradient.contiguous(memory_format=torch._prims_common.suggest_memory_format(features))


def style_loss(features: list[Tensor], targets: list[Tensor], weights: list[float]) -> list[Tensor]:
    """The loss, then for each layer the difference of its Gram matrices from the target."""
    differences = [cross(f, f, "elements") - t.to(accumulated(f).dtype) for f, t in zip(features, targets, strict=True)]
    terms = [w / 4 * (d * d).sum() / max(1, d.shape[0]) for d, w in zip(differences, weights, strict=True)]
    return [sum(terms[1:], terms[0]), *differences]
