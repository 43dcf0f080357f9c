"""Convolution layers: :class:`Conv2d`, :class:`ConvTranspose2d`, and :class:`ConvNormAct` that fuses what follows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops._layouts import memory_of

_ACTIVATIONS = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.GELU: "gelu",
    nn.Tanh: "tanh",
}


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` on :func:`fastcv.ops.conv2d`: the same arguments, state dict and results to rounding.

    Args: those of :class:`torch.nn.Conv2d`.

    Called with ``input`` ``[N, C, H, W]`` or ``[C, H, W]``; ``residual``, of the output's shape, is added before
    ``activation``, one of those of :func:`fastcv.ops.conv2d`, whose errors are raised too.

    Example:
        >>> import torch, fastcv
        >>> layer = fastcv.nn.Conv2d(3, 8, 3, padding=1)
        >>> layer.load_state_dict(torch.nn.Conv2d(3, 8, 3).state_dict())
        <All keys matched successfully>
        >>> layer(torch.zeros(2, 3, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def forward(self, input: Tensor, residual: Tensor | None = None, activation: str = "none") -> Tensor:
        return self._fused(input, self.weight, self.bias, residual, activation)

    def _fused(self, input, weight, bias, residual=None, activation="none", negative_slope=0.01):
        unbatched = input.dim() == 3
        x, padding = (input[None] if unbatched else input), self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        result = ops.conv2d(
            x, weight, bias, self.stride, padding, self.dilation, self.groups,
            residual=residual, activation=activation, negative_slope=negative_slope,
        )  # fmt: skip
        return result[0] if unbatched else result


class ConvTranspose2d(nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` on :func:`fastcv.ops.conv_transpose2d`: the same arguments, state dict and
    results to rounding.

    Args: those of :class:`torch.nn.ConvTranspose2d`.

    Called with ``input`` ``[N, C, H, W]`` or ``[C, H, W]`` and, as torch's layer, ``output_size``; ``residual``, of the
    output's shape, is added before ``activation``, one of those of :func:`fastcv.ops.conv_transpose2d`, whose errors
    are raised too.

    Example:
        >>> import torch, fastcv
        >>> layer = fastcv.nn.ConvTranspose2d(3, 8, 4, stride=2, padding=1)
        >>> layer.load_state_dict(torch.nn.ConvTranspose2d(3, 8, 4).state_dict())
        <All keys matched successfully>
        >>> layer(torch.zeros(2, 3, 5, 5)).shape
        torch.Size([2, 8, 10, 10])
    """

    def forward(
        self,
        input: Tensor,
        output_size: list[int] | None = None,
        residual: Tensor | None = None,
        activation: str = "none",
    ) -> Tensor:
        unbatched = input.dim() == 3
        x = input[None] if unbatched else input
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        result = ops.conv_transpose2d(
            x, self.weight, self.bias, self.stride, self.padding, tuple(output_padding), self.groups, self.dilation,
            residual=residual, activation=activation,
        )  # fmt: skip
        return result[0] if unbatched else result


class ConvNormAct(nn.Sequential):
    """A convolution, a batch norm and an activation, in one pass over the output where the norm's statistics are fixed.

    In evaluation mode, without gradients, the norm is folded into the convolution's weights, once, until one of them
    changes. Otherwise, and with a convolution or activation that is not one of those below, the layers run one after
    the other.

    Args:
        conv: a :class:`fastcv.nn.Conv2d`, or another :class:`torch.nn.Conv2d`.
        norm: a :class:`torch.nn.BatchNorm2d`, :class:`fastcv.ops.FrozenBatchNorm2d` or torchvision's, or None.
        activation: a module, or None; :class:`torch.nn.ReLU`, ``ReLU6``, ``LeakyReLU``, ``SiLU``, ``Hardswish``,
            ``Hardsigmoid``, ``Sigmoid`` and ``GELU`` (the exact one) go into the pass.

    The state dict is that of ``torch.nn.Sequential(conv, norm, activation)`` without those that are None.

    Raises:
        TypeError: ``conv`` is no :class:`torch.nn.Conv2d`.

    Example:
        >>> import torch, fastcv
        >>> block = fastcv.nn.ConvNormAct(fastcv.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> with torch.inference_mode():
        ...     block.eval()(torch.zeros(1, 3, 5, 5)).shape
        torch.Size([1, 8, 3, 3])
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None = None, activation: nn.Module | None = None):
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv: expected a Conv2d, got {type(conv).__name__}")
        super().__init__(*(layer for layer in (conv, norm, activation) if layer is not None))
        self._has = norm is not None, activation is not None
        self._folded: tuple | None = None

    def forward(self, input: Tensor) -> Tensor:
        layers = list(self)
        conv, (has_norm, has_activation) = layers[0], self._has
        norm = layers[1] if has_norm else None
        activation = layers[-1] if has_activation else None
        # Frozen norms have no batch statistics, whatever the mode.
        batch = isinstance(norm, nn.modules.batchnorm._BatchNorm)
        fixed = norm is None or (getattr(norm, "running_var", None) is not None and not (batch and norm.training))
        known = activation is None or type(activation) in _ACTIVATIONS
        known = known and getattr(activation, "approximate", "none") == "none"  # of GELU
        if torch.is_grad_enabled() or not (fixed and known) or not isinstance(conv, Conv2d):
            return super().forward(input)
        name = "none" if activation is None else _ACTIVATIONS[type(activation)]
        slope = getattr(activation, "negative_slope", 0.01)
        return conv._fused(input, *self._fold(conv, norm), activation=name, negative_slope=slope)

    def __getstate__(self):
        return {**self.__dict__, "_folded": None}  # of this one's memory

    def _fold(self, conv: nn.Conv2d, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
        if norm is None:
            return conv.weight, conv.bias
        parts = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        countable = all(p is None or not p.is_inference() for p in parts)
        state = tuple(None if p is None else memory_of(p) for p in parts) if countable else None
        if self._folded is None or self._folded[0] != state or not countable:
            with torch.inference_mode(False):  # a weight that counts its changes, so that what is laid out is kept
                folded = fold_norm(*(None if p is None else p.detach() for p in parts), norm.eps)
            storages = [p.untyped_storage() for p in parts if p is not None]
            self._folded = (state, folded, storages)
        return self._folded[1]


def fold_norm(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that contains the batch norm after it, computed in float64."""
    scale = (variance.double() + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.double()
    shift = (0 if bias is None else bias.double()) - mean.double()
    shift = shift * scale
    if beta is not None:
        shift = shift + beta.double()
    folded = weight.double() * scale[:, None, None, None]
    return folded.to(weight.dtype), shift.to(weight.dtype)
