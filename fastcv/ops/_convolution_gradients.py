"""Gradients of convolutions as operators: of the weight ``conv2d_weight_gradient``, of the input the transposed one.

A transposed convolution exchanges the roles: the gradient of its input is a convolution, and its weight's the same
operator with input and gradient exchanged. On CUDA devices, where ``FASTCV_TRITON`` asks for kernels in Triton,
all derivatives of convolutions are made of these; elsewhere weights' are torch's ``convolution_backward``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import reference
from .._library import LIBRARY, define
from . import _convolution
from ._autograd import register_autograd
from ._vmap import register_image_vmap

define(
    "conv2d_weight_gradient(Tensor grad, Tensor input, SymInt[2] size, int groups, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, bool channels_last) -> Tensor",
    reference.convolution_gradients.conv2d_weight_gradient,
    triton=True,
    torch_has_kernel=True,
)


def conv2d(input: Tensor, weight: Tensor, groups, stride, padding, dilation) -> Tensor:
    """Linear, and differentiable as often as one likes."""
    on_triton = _convolution.on_triton("auto", input, weight)
    operator = torch.ops.fastcv.conv2d if on_triton else reference.conv2d.conv2d
    return operator(input, weight, None, None, None, groups, stride, padding, dilation, "none", 0.0, "auto")


def conv2d_transposed(
    grad: Tensor, weight: Tensor, size, groups, stride, padding, dilation, at_rest: bool = False
) -> Tensor:
    """The gradient of conv2d's input, which is of ``size``. Weights ``at_rest`` are laid out once."""
    options = zip(size, grad.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    extra = [n - (o - 1) * s + 2 * p - d * (k - 1) - 1 for n, o, k, s, p, d in options]
    if at_rest:
        from .conv_transpose2d import conv_transpose2d  # which needs this file

        with torch.autocast(grad.device.type, enabled=False):
            return conv_transpose2d(grad, weight, None, stride, padding, extra, groups, dilation)
    on_triton = _convolution.on_triton("auto", grad, weight)
    operator = torch.ops.fastcv.conv_transpose2d if on_triton else reference.conv_transpose2d.conv_transpose2d
    return operator(grad, weight, None, None, None, groups, stride, padding, extra, dilation, "none", 0.0, "auto")


def convolution_gradients(grad: Tensor, input: Tensor, weight: Tensor, geometry, needs) -> list[Tensor | None]:
    """Of input, weight and bias, where they are needed. ``geometry`` as in register_convolution."""
    groups, stride, padding, *output_padding, dilation = geometry
    options = groups, stride, padding, dilation
    gradients: list[Tensor | None] = [None] * 3
    if needs[0] and output_padding:
        d_input = conv2d(grad, weight, *options)
        gradients[0] = d_input[:, :, : input.shape[2], : input.shape[3]]  # more where output_padding >= stride
    elif needs[0]:
        at_rest = not needs[1] and type(weight) in (Tensor, nn.Parameter)
        gradients[0] = conv2d_transposed(grad, weight, input.shape[2:], *options, at_rest)
    if needs[1]:
        pair = (input, grad) if output_padding else (grad, input)
        last = torch._prims_common.suggest_memory_format(weight) == torch.channels_last
        gradients[1] = torch.ops.fastcv.conv2d_weight_gradient(*pair, list(weight.shape[2:]), *options, last)
    if needs[2]:
        gradients[2] = grad.sum((0, 2, 3))
    return gradients


# ---- fake kernel and derivatives -----------------------------------------------------------------


@torch.library.register_fake("fastcv::conv2d_weight_gradient", lib=LIBRARY)
def _(grad, input, size, groups, stride, padding, dilation, channels_last):
    shape = (grad.shape[1], input.shape[1] // groups, *size)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format)


def _setup(ctx, inputs, output):
    grad, input, *ctx.rest = inputs
    ctx.save_for_backward(grad, input)
    ctx.save_for_forward(grad, input)


def _backward(ctx, cotangent):
    """Linear in both arguments: of each its derivative is a convolution by the cotangent."""
    grad, input = ctx.saved_tensors
    geometry = ctx.rest[1:5]
    d_grad = d_input = None
    if ctx.needs_input_grad[0]:
        d_grad = conv2d(input, cotangent, *geometry)[:, :, : grad.shape[2], : grad.shape[3]]
    if ctx.needs_input_grad[1]:
        d_input = conv2d_transposed(grad, cotangent, input.shape[2:], *geometry)
    return d_grad, d_input, *[None] * len(ctx.rest)


def _jvp(ctx, d_grad, d_input, *_):
    grad, input = ctx.saved_tensors
    terms = []
    if d_grad is not None:
        terms.append(torch.ops.fastcv.conv2d_weight_gradient(d_grad, input, *ctx.rest))
    if d_input is not None:
        terms.append(torch.ops.fastcv.conv2d_weight_gradient(grad, d_input, *ctx.rest))
    return sum(terms[1:], terms[0])


register_autograd("conv2d_weight_gradient", setup_context=_setup, backward=_backward, jvp=_jvp)
register_image_vmap("conv2d_weight_gradient")
