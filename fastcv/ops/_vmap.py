"""A vmap rule for operators on images that share weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import LIBRARY
from ._rois import front


def register_image_vmap(name: str, *images: int) -> None:
    """vmap of ``fastcv::name``: one call with the mapped dimension among the images where only they are mapped.

    Args:
        name: the operator; its arguments are no lists of tensors, and it returns one tensor ``[N, ...]``.
        images: which arguments are ``[N, ...]``. Where others are mapped, samples are computed one after the other.
    """
    op = getattr(torch.ops.fastcv, name).default

    def rule(info, in_dims, *args):
        size = info.batch_size
        dims = [dim if isinstance(arg, Tensor) else None for arg, dim in zip(args, in_dims, strict=True)]
        if all(dim is None or i in images for i, dim in enumerate(dims)):
            folded = [
                front(arg, dims[i], size).flatten(0, 1) if i in images and isinstance(arg, Tensor) else arg
                for i, arg in enumerate(args)
            ]
            result = op(*folded)
            return result.unflatten(0, (size, result.shape[0] // size)), 0
        samples = (
            op(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, dims, strict=True)))
            for i in range(size)
        )
        return torch.stack(list(samples)), 0

    torch.library.register_vmap(f"fastcv::{name}", rule, lib=LIBRARY)
