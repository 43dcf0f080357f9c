"""Linear layers: :class:`Linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..ops._autograd import needs_derivatives
from ..ops._checks import check_one_of
from ..ops._convolution import ACTIVATIONS, on_kernels, tracing
from ..ops._layouts import kept_layout

_GEOMETRY = (1, [1, 1], [0, 0], [1, 1])
_MOST_VECTORS = 4  # that the kernel "gemv" takes, which reads the weights where they lie
_LEAST_CHANNELS = 16
_LEAST_WEIGHTS = 1 << 20  # with fewer the call takes longer (20 us) than the kernels save
_LEAST_OF_ONE = 1 << 22  # the same for a single vector, where torch reads the weights nearly as fast


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` on fastcv's kernels: the same arguments, state dict and results to rounding.

    Without gradients, in float32 on the CPU and with a million weights or more (four million for a single vector), up
    to four vectors are multiplied with the weights where these lie, and more with a copy of them laid out for it, which
    is kept until they change (so that they take twice the memory). Otherwise the layer is torch's.

    Args: those of :class:`torch.nn.Linear`.

    Called with ``input`` ``[..., in_features]``; gives ``[..., out_features]``.

    Example:
        >>> import torch, fastcv
        >>> layer = fastcv.nn.Linear(2048, 1000)
        >>> layer.load_state_dict(torch.nn.Linear(2048, 1000).state_dict())
        <All keys matched successfully>
        >>> with torch.inference_mode():
        ...     layer(torch.zeros(2, 3, 2048), activation="relu").shape
        torch.Size([2, 3, 1000])
    """

    def forward(self, input: Tensor, activation: str = "none") -> Tensor:
        """``activation(input @ weight.T + bias)``, in one pass.

        Raises:
            ValueError: an activation that is not one of those of :func:`fastcv.ops.conv2d`.
            RuntimeError: an input of wrong shape or type, as of :func:`torch.nn.functional.linear`.
        """
        check_one_of("activation", activation, ACTIVATIONS)
        if not self._on_kernels(input):
            return reference.conv2d.ACTIVATIONS[activation](F.linear(input, self.weight, self.bias), 0.01)
        vectors = input.reshape(-1, self.in_features).contiguous()
        count, channels = vectors.shape
        kernel = "gemv" if count <= _MOST_VECTORS else "gemm"
        weight = _as_filters(self.weight)
        # Vectors are the pixels of a channels-last map of one row.
        row = vectors.as_strided((1, channels, 1, count), (vectors.numel(), 1, vectors.numel(), channels))
        prepared = weight.reshape(-1) if kernel == "gemv" else kept_layout(self.weight, ("linear",), _laid_out)
        with torch._C._AutoDispatchBelowAutograd():
            result = torch.ops.fastcv.conv2d.default(
                row, weight, self.bias, None, prepared, *_GEOMETRY, activation, 0.01, kernel
            )
        return result[0, :, 0].t().reshape(*input.shape[:-1], self.out_features)

    def _on_kernels(self, input: Tensor) -> bool:
        weight, bias = self.weight, self.bias
        if weight.numel() < _LEAST_WEIGHTS or self.in_features < _LEAST_CHANNELS or tracing():
            return False
        tensors = (input, weight) if bias is None else (input, weight, bias)
        if any(type(t) not in (Tensor, nn.Parameter) for t in tensors) or torch.is_autocast_enabled("cpu"):
            return False
        if not on_kernels(*tensors):
            return False
        if input.dim() == 0 or input.shape[-1] != self.in_features or input.numel() == 0:
            return False  # torch's error, or its empty result
        if not weight.is_contiguous() or needs_derivatives(*tensors):
            return False
        if input.numel() == self.in_features and weight.numel() < _LEAST_OF_ONE:
            return False
        # A weight that counts no changes could only be laid out at every call.
        return not weight.is_inference() or input.numel() <= _MOST_VECTORS * self.in_features


def _as_filters(weight: Tensor) -> Tensor:
    """``[K, C, 1, 1]``, contiguous in torch's eyes as well."""
    return weight.as_strided((*weight.shape, 1, 1), (weight.shape[1], 1, 1, 1))


def _laid_out(weight: Tensor) -> Tensor:
    """For the matrix product."""
    return torch.ops.fastcv.conv2d_prepare(_as_filters(weight), *_GEOMETRY, "gemm")
