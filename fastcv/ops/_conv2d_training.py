"""Convolutions whose weights are trained: which kernel, and the gradient of the input as an operator of its own."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define
from ._autograd import register_autograd
from ._convolution import on_kernels, tracing

define(
    "conv2d_input_gradient(Tensor grad, Tensor weight, SymInt[2] padding, str kernel) -> Tensor",
    reference.conv2d.conv2d_input_gradient,
)

# A kernel must win by more than the model of _kernel can be off.
_MARGIN = 0.8
_CORES = 2


@functools.lru_cache(maxsize=4096)
def _kernel(
    images: int,
    channels: int,
    outputs: int,
    height: int,
    width: int,
    channels_last: bool,
    transposed: bool,
) -> str:
    """Kernel of a 3x3 convolution with stride 1 whose weights are used once; ``height`` and ``width`` of its output.

    A model of its time on two cores, in units of 20 ps of one core, in which torch multiplies and adds once (Zen 4;
    cores that take longer do so for all terms):

    * torch: 9 for each pixel and pair of channels;
    * Winograd: 1.25 (2 x 2: 1.05) times (M + 2)^2 for each tile and pair of channels, and the transforms of
      (M + 2)^2 elements, 7 for each channel and output;
    * weights of a pair of channels: 1800 to lay out for tiles of 4 x 4, 900 for 2 x 2, and 900 to transpose;
    * contiguous memory: 60 for each number of input and output;
    * 200 us for an operator and its derivative in Python, and for torch's that no longer share work.
    """
    pixels, lanes = images * height * width, [16 * -(-n // 16) for n in (channels, outputs)]
    best, kernel = _MARGIN * 9 * pixels * channels * lanes[1] / _CORES, "torch"
    moved = 0 if channels_last else 60 * pixels * (channels + outputs)
    for name, m, rate, layout in (("winograd", 4, 1.25, 1800), ("winograd_2x2", 2, 1.05, 900)):
        elements = images * -(-height // m) * -(-width // m) * (m + 2) ** 2
        products = rate * elements * (channels * lanes[1] + 7 * sum(lanes))
        weights = (layout + 900 * transposed) * channels * outputs
        cost = (products + weights + moved) / _CORES + 10e6
        if cost < best:
            best, kernel = cost, name
    return kernel


def _is_plain_3x3(weight: Tensor, geometry) -> bool:
    groups, stride, _, dilation = geometry
    return groups == 1 and list(stride) == list(dilation) == [1, 1] and tuple(weight.shape[2:]) == (3, 3)


def _is_channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)


def training_kernel(input: Tensor, weight: Tensor, geometry) -> str:
    """Kernel of a convolution whose weights are trained, ``"torch"`` for torch's."""
    if not _is_plain_3x3(weight, geometry):
        return "torch"
    size = [n + 2 * p - 2 for n, p in zip(input.shape[2:], geometry[2], strict=True)]
    shape = (*input.shape[:2], weight.shape[0], *size)
    return _kernel(*shape, _is_channels_last(input), False)


def input_gradient_kernel(grad: Tensor, weight: Tensor, geometry) -> str:
    """Kernel of the gradient of the input, ``"torch"`` for ``convolution_backward``."""
    if not _is_plain_3x3(weight, geometry):
        return "torch"
    # A transform or a tracer has rules for torch's operators.
    plain = not tracing() and type(grad) in (Tensor, torch.nn.Parameter)
    padding = geometry[2]
    if not plain or max(padding) > 2 or not on_kernels(grad, weight):
        return "torch"
    size = [n + 2 - 2 * p for n, p in zip(grad.shape[2:], padding, strict=True)]
    shape = (*grad.shape[:2], weight.shape[1], *size)
    return _kernel(*shape, _is_channels_last(grad), True)


def input_gradient(grad: Tensor, input: Tensor, weight: Tensor, geometry, needs) -> Tensor | None:
    """The gradient of the input, None where it is torch's."""
    kernel = input_gradient_kernel(grad, weight, geometry)
    return None if kernel == "torch" else torch.ops.fastcv.conv2d_input_gradient(grad, weight, geometry[2], kernel)


@torch.library.register_fake("fastcv::conv2d_input_gradient", lib=LIBRARY)
def _(grad, weight, padding, kernel):
    size = [n + k - 1 - 2 * p for n, k, p in zip(grad.shape[2:], weight.shape[2:], padding, strict=True)]
    memory_format = torch._prims_common.suggest_memory_format(grad)
    return grad.new_empty((grad.shape[0], weight.shape[1], *size)).contiguous(memory_format=memory_format)


def _setup(ctx, inputs, output):
    grad, weight, ctx.padding, ctx.kernel = inputs
    ctx.save_for_backward(grad, weight)
    ctx.save_for_forward(grad, weight)


def _backward(ctx, cotangent):
    """Linear in both arguments; of the first it is the convolution's transpose."""
    grad, weight = ctx.saved_tensors
    d_grad = d_weight = None
    if ctx.needs_input_grad[0]:
        geometry = (1, [1, 1], ctx.padding, [1, 1])
        d_grad = torch.ops.fastcv.conv2d(cotangent, weight, None, None, None, *geometry, "none", 0.0, ctx.kernel)
    if ctx.needs_input_grad[1]:
        _, d_weight, _ = torch.ops.aten.convolution_backward(
            grad, cotangent, weight, None, [1, 1], ctx.padding, [1, 1], False, [0, 0], 1, [False, True, False]
        )
    return d_grad, d_weight, None, None


def _jvp(ctx, d_grad, d_weight, *_):
    grad, weight = ctx.saved_tensors
    terms = []
    if d_grad is not None:
        terms.append(torch.ops.fastcv.conv2d_input_gradient(d_grad, weight, ctx.padding, ctx.kernel))
    if d_weight is not None:
        terms.append(torch.ops.fastcv.conv2d_input_gradient(grad, d_weight, ctx.padding, ctx.kernel))
    return sum(terms[1:], terms[0])


register_autograd("conv2d_input_gradient", setup_context=_setup, backward=_backward, jvp=_jvp)
