"""Convolution with weights of its own at every output pixel, a locally connected layer: :func:`conv2d_local`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define
from ._autocast import any_enabled, autocast
from ._autograd import register_autograd
from ._checks import check_floating, check_same_device, check_shape, pair
from ._vmap import register_image_vmap

_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation"
define(
    f"conv2d_local(Tensor input, Tensor weight, {_GEOMETRY}) -> Tensor",
    reference.conv2d_local.conv2d_local,
    triton=True,
)
define(
    f"conv2d_local_input_backward(Tensor grad, Tensor weight, SymInt[2] input_size, {_GEOMETRY}) -> Tensor",
    reference.conv2d_local.conv2d_local_input_backward,
    triton=True,
)
define(
    f"conv2d_local_weight_backward(Tensor grad, Tensor input, SymInt[2] kernel_size, {_GEOMETRY}) -> Tensor",
    reference.conv2d_local.conv2d_local_weight_backward,
    triton=True,
)


def conv2d_local(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """A convolution that shares no weights: output pixel (y, x) has the kernel ``weight[y, x]``.

    Source: Taigman, Yang, Ranzato and Wolf, "DeepFace: closing the gap to human-level performance in face
    verification", CVPR 2014, section 3 (layers L4 to L6).

    Args:
        input: ``[N, C, H, W]``, any floating type, contiguous or channels-last.
        weight: ``[OH, OW, K, C, KH, KW]`` of the same type, with OH and OW as of :func:`fastcv.ops.conv2d`.
        bias: ``[K, OH, OW]``.
        stride, padding, dilation: as in :func:`fastcv.ops.conv2d`.

    Returns:
        ``[N, K, OH, OW]`` in the input's dtype and memory format. Differentiable with respect to all tensors, in both
        modes, twice. Bit-equal for any number of threads. Under autocast it has its type, as of
        :func:`fastcv.ops.conv2d`.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or device.

    Example:
        >>> import torch, fastcv
        >>> x = torch.tensor([1., 2., 3.]).reshape(1, 1, 1, 3)
        >>> weight = torch.tensor([[1., 0.], [10., 100.]]).reshape(1, 2, 1, 1, 1, 2)
        >>> fastcv.ops.conv2d_local(x, weight).flatten()
        tensor([  1., 320.])
    """
    if any_enabled():
        tensors = dict(input=input, weight=weight, bias=bias)
        result = autocast(conv2d_local, tensors, stride=stride, padding=padding, dilation=dilation)
        if result is not None:
            return result
    check_floating("input", input)
    check_shape("input", input, ("N", "C", "H", "W"))
    check_floating("weight", weight)
    stride, dilation = list(pair("stride", stride)), list(pair("dilation", dilation))
    padding = list(pair("padding", padding, minimum=0))
    check_shape("weight", weight, ("OH", "OW", "K", input.shape[1], "KH", "KW"))
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(input.shape[2:], weight.shape[4:], stride, padding, dilation, strict=True)
    ]
    if any(k < 1 for k in weight.shape[4:]) or any(n < 1 for n in size):
        raise ValueError(f"weight: expected a kernel that fits the padded input, got {list(weight.shape)}")
    check_shape("weight", weight, (*size, "K", input.shape[1], "KH", "KW"))
    if weight.dtype != input.dtype:
        raise TypeError(f"weight: expected the dtype of input, {input.dtype}, got {weight.dtype}")
    check_same_device("weight", weight, "input", input)
    output = torch.ops.fastcv.conv2d_local(input, weight, stride, padding, dilation)
    if bias is None:
        return output
    check_floating("bias", bias)
    check_shape("bias", bias, (weight.shape[2], *size))
    check_same_device("bias", bias, "input", input)
    return output + bias.to(output.dtype)


# ---- fake kernels --------------------------------------------------------------------------------


def _map(like, channels, size):
    memory_format = torch._prims_common.suggest_memory_format(like)
    shape = (like.shape[0], channels, *size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


@torch.library.register_fake("fastcv::conv2d_local", lib=LIBRARY)
def _(input, weight, stride, padding, dilation):
    return _map(input, weight.shape[2], weight.shape[:2])


@torch.library.register_fake("fastcv::conv2d_local_input_backward", lib=LIBRARY)
def _(grad, weight, input_size, stride, padding, dilation):
    return _map(grad, weight.shape[3], input_size)


@torch.library.register_fake("fastcv::conv2d_local_weight_backward", lib=LIBRARY)
def _(grad, input, kernel_size, stride, padding, dilation):
    return grad.new_empty(*grad.shape[2:], grad.shape[1], input.shape[1], *kernel_size)


# ---- derivatives: <grad, conv(input, weight)> is linear in each of the three; an operator is its derivative for one --


def _output(input, weight, geometry):
    return torch.ops.fastcv.conv2d_local(input, weight, *geometry)


def _of_input(grad, weight, size, geometry):
    return torch.ops.fastcv.conv2d_local_input_backward(grad, weight, list(size), *geometry)


def _of_weight(grad, input, size, geometry):
    return torch.ops.fastcv.conv2d_local_weight_backward(grad, input, list(size), *geometry)


def _setup(ctx, inputs, output):
    first, second, *ctx.constants = inputs
    ctx.geometry = ctx.constants[-3:]
    ctx.save_for_backward(first, second)
    ctx.save_for_forward(first, second)


def _backward(ctx, grad):
    input, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    first = _of_input(grad, weight, input.shape[2:], ctx.geometry) if needs[0] else None
    second = _of_weight(grad, input, weight.shape[4:], ctx.geometry) if needs[1] else None
    return first, second, None, None, None


def _backward_of_input_backward(ctx, grad):
    of_output, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    first = _output(grad, weight, ctx.geometry) if needs[0] else None
    second = _of_weight(of_output, grad, weight.shape[4:], ctx.geometry) if needs[1] else None
    return first, second, None, None, None, None


def _backward_of_weight_backward(ctx, grad):
    of_output, input = ctx.saved_tensors
    needs = ctx.needs_input_grad
    first = _output(input, grad, ctx.geometry) if needs[0] else None
    second = _of_input(of_output, grad, input.shape[2:], ctx.geometry) if needs[1] else None
    return first, second, None, None, None, None


for _name, _gradient in (
    ("conv2d_local", _backward),
    ("conv2d_local_input_backward", _backward_of_input_backward),
    ("conv2d_local_weight_backward", _backward_of_weight_backward),
):
    _operator = getattr(torch.ops.fastcv, _name)

    def _jvp(ctx, d_first, d_second, *_, operator=_operator):
        first, second = ctx.saved_tensors
        terms = [] if d_first is None else [operator(d_first, second, *ctx.constants)]
        if d_second is not None:
            terms.append(operator(first, d_second, *ctx.constants))
        return sum(terms[1:], terms[0])

    register_autograd(_name, setup_context=_setup, backward=_gradient, jvp=_jvp)

register_image_vmap("conv2d_local", 0)
register_image_vmap("conv2d_local_input_backward", 0)
register_image_vmap("conv2d_local_weight_backward")
