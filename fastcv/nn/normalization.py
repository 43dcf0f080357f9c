"""Normalisation layers: :class:`LocalResponseNorm`."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops


class LocalResponseNorm(nn.LocalResponseNorm):
    """:class:`torch.nn.LocalResponseNorm` on :func:`fastcv.ops.local_response_norm`.

    Args: those of :class:`torch.nn.LocalResponseNorm`.

    Example:
        >>> import torch, fastcv
        >>> fastcv.nn.LocalResponseNorm(2, alpha=2.0, beta=0.5)(torch.ones(1, 3, 1, 1)).flatten()
        tensor([0.7071, 0.5774, 0.5774])
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.local_response_norm(input, self.size, self.alpha, self.beta, self.k)
