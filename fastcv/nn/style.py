"""Layers of style transfer: :class:`GramMatrix` and :class:`StyleLoss`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import ops


class GramMatrix(nn.Module):
    """:func:`fastcv.ops.gram_matrix` as a layer.

    Args:
        normalize: as there.

    Example:
        >>> import torch, fastcv
        >>> fastcv.nn.GramMatrix()(torch.ones(1, 2, 3, 3))
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]]])
    """

    def __init__(self, normalize: bool | str = True):
        super().__init__()
        self.normalize = normalize

    def forward(self, features: Tensor) -> Tensor:
        return ops.gram_matrix(features, normalize=self.normalize)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize!r}"


class StyleLoss(nn.Module):
    """:func:`fastcv.ops.style_loss` with targets as buffers, which move and are saved with the module.

    Args:
        targets: of each layer the Gram matrix of the style image, as :func:`fastcv.ops.gram_matrix` gives it.
        weights: of the layers; by default all alike, with sum 1.

    Example:
        >>> import torch, fastcv
        >>> style = [torch.ones(1, 2, 3, 3), torch.ones(1, 4, 2, 2)]
        >>> loss = fastcv.nn.StyleLoss([fastcv.ops.gram_matrix(f) for f in style])
        >>> loss(style), loss([2 * f for f in style])
        (tensor(0.), tensor(2.2500))
    """

    def __init__(self, targets: Sequence[Tensor], weights: Sequence[float] | None = None):
        super().__init__()
        for i, target in enumerate(targets):
            self.register_buffer(f"target{i}", target.detach())
        self.weights = None if weights is None else [float(w) for w in weights]

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return ops.style_loss(features, list(self.buffers()), self.weights)

    def extra_repr(self) -> str:
        return f"layers={len(list(self.buffers()))}, weights={self.weights}"
