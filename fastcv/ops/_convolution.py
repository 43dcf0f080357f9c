"""What :func:`conv2d` and :func:`conv_transpose2d` share: where kernels run, what calls alike share, derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _library, reference
from ._autograd import register_autograd

ACTIVATIONS = tuple(reference.conv2d.ACTIVATIONS)


def on_kernels(*tensors: Tensor | None) -> bool:
    """Whether the compiled kernels take these."""
    for t in tensors:  # a plain loop: all() would take a third of a small call
        if t is not None and not (t.dtype is torch.float32 and t.is_cpu):
            return False
    return _library.cpu_loaded


def on_triton(kernel: str, *tensors: Tensor | None) -> bool:
    """Whether Triton's kernels take these, which they do on request: on a CUDA device, of one type."""
    if kernel != "auto" or "conv2d" not in _library._from_triton:
        return False
    return all(t is None or (t.is_cuda and t.dtype is tensors[0].dtype) for t in tensors)


def tracing() -> bool:
    """Whether torch.compile, a transform of torch.func or fake tensors look on: weights may stand for others."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


# ---- calls alike ---------------------------------------------------------------------------------

# What checks and the choice of a kernel found, by call_key. They would take longer than a small layer.
calls: dict[tuple | None, Any] = {}
_MOST_CALLS = 4096


def remember_call(key: tuple | None, call: tuple) -> None:
    if key is not None:
        if len(calls) >= _MOST_CALLS:
            calls.clear()
        calls[key] = call


def call_key(input: Tensor, weight: Tensor, bias, residual, options: tuple) -> tuple | None:
    """What the checks look at, where it is short: for tensors that the compiled kernels take.

    ``options`` name the operator as well.
    """
    try:
        if tracing() or not on_kernels(input, weight, bias, residual):
            return None
        for option in options:  # 1.0 and True are as good a key as 1
            if type(option) is tuple:
                for number in option:
                    if type(number) is not int:
                        return None
            elif type(option) is not int and type(option) is not str:
                return None
        shapes = (input.shape, weight.shape, bias if bias is None else bias.shape)
        return (*shapes, residual if residual is None else residual.shape, *options)
    except AttributeError:  # not tensors
        return None


# ---- derivatives ---------------------------------------------------------------------------------


def slope_of(activation: str, x: Tensor, slope: float) -> Tensor:
    """The derivative of an activation, of operators that have derivatives themselves."""
    if activation == "relu":
        return (x > 0).to(x.dtype)
    if activation == "relu6":
        return ((x > 0) & (x < 6)).to(x.dtype)
    if activation == "leaky_relu":
        return torch.where(x > 0, 1.0, slope).to(x.dtype)
    if activation == "hardsigmoid":
        return ((x > -3) & (x < 3)).to(x.dtype) / 6
    if activation == "hardswish":
        return torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, x / 3 + 0.5))
    if activation == "gelu":
        return torch.special.ndtr(x) + x * (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)
    if activation == "tanh":
        return 1 - x.tanh().square()
    s = x.sigmoid()
    return s * (1 - s) if activation == "sigmoid" else s * (1 + x * (1 - s))


def _shows_slope(activation: str, slope: float) -> bool:
    """Whether the output of an activation tells its derivative: it is above 0 (and below 6) just where its input is."""
    return activation in ("relu", "relu6") or (activation == "leaky_relu" and slope >= 0)


def _times_shown_slope(values: Tensor, activation: str, output: Tensor, slope: float) -> Tensor:
    """``values`` times the derivative, in one pass."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(values, output, 0)
    if activation == "relu6":
        return torch.ops.aten.hardtanh_backward(values, output, 0, 6)
    return torch.ops.aten.leaky_relu_backward(values, output, slope, True)


def register_convolution(name: str, input_gradient: Callable) -> None:
    """Derivatives of ``fastcv::name(input, weight, bias, residual, prepared, *geometry, activation, slope, kernel)``.

    ``geometry`` is groups, stride, padding and dilation; of a transposed convolution with output padding before the
    last. ``input_gradient(grad, input, weight, geometry, needs_input_grad)`` gives the gradient of the input, or None
    where it is torch's. Those of weight and bias are torch's as well, but all are Triton's where the convolution is.
    """
    from ._convolution_gradients import convolution_gradients  # which needs on_triton

    op = getattr(torch.ops.fastcv, name)

    def setup(ctx, inputs, output):
        input, weight, bias, residual, _, *ctx.geometry, ctx.activation, ctx.slope, ctx.kernel = inputs
        ctx.shows_slope = on_triton(ctx.kernel, input, weight) and _shows_slope(ctx.activation, ctx.slope)
        ctx.save_for_backward(input, weight, bias, output if ctx.shows_slope else residual)
        ctx.save_for_forward(input, weight, bias, residual)

    def linear(ctx, *tensors):
        return op(*tensors, None, *ctx.geometry, "none", 0.0, ctx.kernel)

    def times_slope(ctx, values):
        if ctx.activation == "none":
            return values
        return values * slope_of(ctx.activation, linear(ctx, *ctx.saved_tensors), ctx.slope)

    def backward(ctx, grad):
        input, weight, bias, output = ctx.saved_tensors
        groups, stride, padding, *output_padding, dilation = ctx.geometry
        needs = ctx.needs_input_grad
        if ctx.shows_slope:
            grad = _times_shown_slope(grad, ctx.activation, output, ctx.slope)
        else:
            grad = times_slope(ctx, grad)
        d_input = input_gradient(grad, input, weight, ctx.geometry, needs) if needs[0] else None
        mask = [needs[0] and d_input is None, needs[1], bias is not None and needs[2]]
        d_others = [None] * 3
        if on_triton(ctx.kernel, grad, input, weight):
            d_others = convolution_gradients(grad, input, weight, ctx.geometry, mask)
        elif any(mask):
            sizes = None if bias is None else list(bias.shape)
            transposed = (True, *output_padding) if output_padding else (False, [0, 0])
            gradients = torch.ops.aten.convolution_backward(
                grad, input, weight, sizes, stride, padding, dilation, *transposed, groups, mask
            )
            d_others = [g if wanted else None for g, wanted in zip(gradients, mask, strict=True)]
        if d_input is not None:
            d_others[0] = d_input
        return *d_others, grad if needs[3] else None, *[None] * (4 + len(ctx.geometry))

    def jvp(ctx, *tangents):
        input, weight, _, _ = ctx.saved_tensors
        d_input, d_weight, d_bias, d_residual, *_ = tangents
        terms = [] if d_residual is None else [d_residual]
        if d_input is not None:
            terms.append(linear(ctx, d_input, weight, None, None))
        if d_weight is not None:
            terms.append(linear(ctx, input, d_weight, None, None))
        if d_bias is not None:
            terms.append(d_bias[:, None, None].expand_as(linear(ctx, input, weight, None, None)))
        return times_slope(ctx, sum(terms[1:], terms[0]))

    register_autograd(name, setup_context=setup, backward=backward, jvp=jvp)
