"""Locally connected layers in plain PyTorch: the specification of ``csrc/conv2d_local``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _as(result: Tensor, like: Tensor) -> Tensor:
    return result.to(like.dtype).contiguous(memory_format=torch._prims_common.suggest_memory_format(like))


def conv2d_local(input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    height, width, outputs, _, *kernel = weight.shape
    patches = F.unfold(_wide(input), kernel, dilation, padding, stride)  # [N, C * KH * KW, OH * OW]
    result = torch.einsum("ndp,pkd->nkp", patches, _wide(weight).reshape(height * width, outputs, -1))
    return _as(result.unflatten(2, (height, width)), input)


def conv2d_local_input_backward(
    grad: Tensor, weight: Tensor, input_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    height, width, outputs, _, *kernel = weight.shape
    matrices = _wide(weight).reshape(height * width, outputs, -1)
    patches = torch.einsum("nkp,pkd->ndp", _wide(grad).flatten(2), matrices)
    return _as(F.fold(patches, input_size, kernel, dilation, padding, stride), grad)


def conv2d_local_weight_backward(
    grad: Tensor, input: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    _, outputs, height, width = grad.shape
    patches = F.unfold(_wide(input), kernel_size, dilation, padding, stride)
    gradient = torch.einsum("nkp,ndp->pkd", _wide(grad).flatten(2), patches).to(grad.dtype)
    return gradient.reshape(height, width, outputs, input.shape[1], *kernel_size)
