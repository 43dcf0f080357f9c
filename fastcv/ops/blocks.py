"""Small building blocks of networks: normalization, convolution with normalization, gates, MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "MLP",
    "Conv2dNormActivation",
    "Conv3dNormActivation",
    "FrozenBatchNorm2d",
    "Permute",
    "SqueezeExcitation",
]


class FrozenBatchNorm2d(nn.Module):
    """Batch normalization whose statistics and affine parameters are constants (buffers).

    Ioffe and Szegedy, "Batch Normalization", ICML 2015, as used at inference. State dicts of
    ``torch.nn.BatchNorm2d`` load too: ``num_batches_tracked`` is dropped.

    Args:
        num_features: channels C of the input ``[N, C, H, W]``.
        eps: added to the variance.

    Example:
        >>> import torch, fastcv
        >>> norm = fastcv.ops.FrozenBatchNorm2d(1, eps=0.0)
        >>> _ = norm.running_mean.fill_(3.0), norm.running_var.fill_(4.0)
        >>> norm(torch.tensor([[[[5.0]]]]))
        tensor([[[[1.]]]])
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.weight.shape[0]}, eps={self.eps})"


class ConvNormActivation(nn.Sequential):
    """Convolution, then normalization and activation where given; see the 2d and 3d classes."""

    def __init__(
        self,
        conv_layer: Callable[..., nn.Module],
        dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int] | str | None,
        groups: int,
        norm_layer: Callable[..., nn.Module] | None,
        activation_layer: Callable[..., nn.Module] | None,
        dilation: int | Sequence[int],
        inplace: bool | None,
        bias: bool | None,
    ) -> None:
        kernel_size = _per_dimension("kernel_size", kernel_size, dims)
        dilation = _per_dimension("dilation", dilation, dims)
        if padding is None:  # keeps the size at stride 1 for odd kernels
            padding = tuple((k - 1) // 2 * d for k, d in zip(kernel_size, dilation, strict=True))
        layers = [
            conv_layer(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                padding,
                dilation=dilation,
                groups=groups,
                bias=norm_layer is None if bias is None else bias,
            )
        ]
        if norm_layer is not None:
            layers.append(norm_layer(out_channels))
        if activation_layer is not None:
            layers.append(activation_layer(**_inplace_argument(inplace)))
        super().__init__(*layers)
        self.out_channels = out_channels


class Conv2dNormActivation(ConvNormActivation):
    """``Conv2d``, normalization, activation, as a ``Sequential``.

    Args:
        in_channels: channels of the input ``[N, C, H, W]``.
        out_channels: channels of the output.
        kernel_size: an int or two.
        stride: an int or two.
        padding: as in ``torch.nn.Conv2d``; None for ``(kernel_size - 1) // 2 * dilation``.
        groups: as in ``torch.nn.Conv2d``.
        norm_layer: called with ``out_channels``; None for no normalization.
        activation_layer: None for no activation.
        dilation: an int or two.
        inplace: passed to ``activation_layer``; None to pass nothing.
        bias: None for a bias exactly where there is no normalization.

    Raises:
        ValueError: ``kernel_size`` or ``dilation`` has another length.

    Example:
        >>> import torch, fastcv
        >>> block = fastcv.ops.Conv2dNormActivation(3, 8, stride=2)
        >>> block(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 8, 16, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        activation_layer: Callable[..., nn.Module] | None = nn.ReLU,
        dilation: int | tuple[int, int] = 1,
        inplace: bool | None = True,
        bias: bool | None = None,
    ) -> None:
        super().__init__(
            nn.Conv2d, 2, in_channels, out_channels, kernel_size, stride, padding, groups,
            norm_layer, activation_layer, dilation, inplace, bias,
        )  # fmt: skip


class Conv3dNormActivation(ConvNormActivation):
    """``Conv3d``, normalization, activation: :class:`Conv2dNormActivation` for volumes.

    Example:
        >>> import torch, fastcv
        >>> block = fastcv.ops.Conv3dNormActivation(3, 8, kernel_size=(1, 3, 3))
        >>> block(torch.zeros(2, 3, 4, 8, 8)).shape
        torch.Size([2, 8, 4, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int] = 3,
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int, int] | str | None = None,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm3d,
        activation_layer: Callable[..., nn.Module] | None = nn.ReLU,
        dilation: int | tuple[int, int, int] = 1,
        inplace: bool | None = True,
        bias: bool | None = None,
    ) -> None:
        super().__init__(
            nn.Conv3d, 3, in_channels, out_channels, kernel_size, stride, padding, groups,
            norm_layer, activation_layer, dilation, inplace, bias,
        )  # fmt: skip


class SqueezeExcitation(nn.Module):
    """Weights every channel by a gate computed from the means of all channels.

    Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, section 3.

    Args:
        input_channels: channels C of the input ``[N, C, H, W]``.
        squeeze_channels: channels between the two 1x1 convolutions.
        activation: after the first convolution.
        scale_activation: after the second; gives the gate.

    Example:
        >>> import torch, fastcv
        >>> gate = fastcv.ops.SqueezeExcitation(8, 2)
        >>> gate(torch.ones(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: Callable[..., nn.Module] = nn.ReLU,
        scale_activation: Callable[..., nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def forward(self, input: Tensor) -> Tensor:
        squeezed = self.activation(self.fc1(self.avgpool(input)))  # [N, squeeze_channels, 1, 1]
        return input * self.scale_activation(self.fc2(squeezed))


class MLP(nn.Sequential):
    """Linear layers, each but the last with normalization (where given) and activation.

    Dropout follows every activation and the last layer.

    Args:
        in_channels: size of the last dimension of the input.
        hidden_channels: sizes after each layer, the last being that of the output.
        norm_layer: called with the size; None for no normalization.
        activation_layer: called with ``inplace`` where that is given.
        inplace: for activation and dropout; None for their defaults.
        bias: of the linear layers.
        dropout: probability of dropout.

    Raises:
        ValueError: ``hidden_channels`` is empty.

    Example:
        >>> import torch, fastcv
        >>> fastcv.ops.MLP(4, [16, 2])(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: list[int],
        norm_layer: Callable[..., nn.Module] | None = None,
        activation_layer: Callable[..., nn.Module] = nn.ReLU,
        inplace: bool | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        if len(hidden_channels) == 0:
            raise ValueError("hidden_channels: expected at least one size, got none")
        options = _inplace_argument(inplace)
        layers: list[nn.Module] = []
        for channels in hidden_channels[:-1]:
            layers.append(nn.Linear(in_channels, channels, bias=bias))
            if norm_layer is not None:
                layers.append(norm_layer(channels))
            layers += [activation_layer(**options), nn.Dropout(dropout, **options)]
            in_channels = channels
        layers.append(nn.Linear(in_channels, hidden_channels[-1], bias=bias))
        super().__init__(*layers, nn.Dropout(dropout, **options))


class Permute(nn.Module):
    """``torch.permute`` as a layer.

    Args:
        dims: the wanted order of the dimensions.

    Example:
        >>> import torch, fastcv
        >>> fastcv.ops.Permute([0, 3, 1, 2])(torch.zeros(1, 4, 5, 3)).shape
        torch.Size([1, 3, 4, 5])
    """

    def __init__(self, dims: list[int]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


def _per_dimension(name: str, value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims:
        raise ValueError(f"{name}: expected an int or {dims} of them, got {value!r}")
    return values


def _inplace_argument(inplace: bool | None) -> dict[str, bool]:
    return {} if inplace is None else {"inplace": inplace}
