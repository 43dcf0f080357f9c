"""Local response normalisation, of AlexNet and GoogLeNet: :func:`local_response_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define
from ..reference.local_response_norm import window_sum
from ._autograd import register_autograd
from ._checks import check_floating, check_threshold
from ._rois import front

_CONSTANTS = "SymInt size, float alpha, float beta, float k"
define(
    f"local_response_norm(Tensor input, {_CONSTANTS}) -> Tensor",
    reference.local_response_norm.local_response_norm,
    triton=True,
    torch_has_kernel=True,
)
define(
    f"local_response_norm_backward(Tensor grad, Tensor input, {_CONSTANTS}) -> Tensor",
    reference.local_response_norm.local_response_norm_backward,
    triton=True,
    torch_has_kernel=True,
)


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """``input * (k + alpha / size * sum of squares over size neighbouring channels) ** -beta``.

    As :func:`torch.nn.functional.local_response_norm`: the window of channel c has the channels from ``c - size // 2``
    to ``c + (size - 1) // 2``, of which those outside the map count as zero, and alpha is divided by ``size``. (The
    paper does not divide: its ``n = 5, alpha = 1e-4`` is ``size=5, alpha=5e-4`` here.)

    Source: Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep convolutional neural networks", NIPS
    2012, section 3.3.

    Args:
        input: ``[N, C, ...]`` of three dimensions or more, any floating type, contiguous or channels-last.
        size: channels of a window, at least 1.
        alpha, beta, k: numbers. ``beta`` of 3/4, 1/2 and 1 is fast; others need a power function.

    Returns:
        Of the input's shape, dtype and memory format. Differentiable in both modes, twice. Bit-equal for any number of
        threads.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or range.

    Example:
        >>> import torch, fastcv
        >>> x = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
        >>> fastcv.ops.local_response_norm(x, size=3, alpha=3.0, beta=1.0).flatten()
        tensor([0.1667, 0.1333, 0.2143])
    """
    check_floating("input", input)
    if input.dim() < 3:
        raise ValueError(f"input: expected at least 3 dimensions, [N, C, ...], got {list(input.shape)}")
    if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)) or size < 1:
        raise ValueError(f"size: expected an int of at least 1, got {size!r}")
    for name, value in (("alpha", alpha), ("beta", beta), ("k", k)):
        check_threshold(name, value)
    maps = input if input.dim() == 4 else input.flatten(2)[:, :, None]
    return torch.ops.fastcv.local_response_norm(maps, size, alpha, beta, k).view_as(input)


# ---- fake kernels --------------------------------------------------------------------------------


def _like(x: Tensor) -> Tensor:
    memory_format = torch._prims_common.suggest_memory_format(x)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


@torch.library.register_fake("fastcv::local_response_norm", lib=LIBRARY)
def _(input, size, alpha, beta, k):
    return _like(input)


@torch.library.register_fake("fastcv::local_response_norm_backward", lib=LIBRARY)
def _(grad, input, size, alpha, beta, k):
    return _like(input)


# ---- derivatives -----------------------------------------------------------------------------------
#
# With d = k + f W(x^2), f = alpha / size, W the window sum and W' the mirrored one:
#   y = x d^-b,   J h = h d^-b - 2 f b x d^(-b-1) W(x h),   J' g = g d^-b - 2 f b x W'(g x d^(-b-1)).
# The derivative of J' g with respect to x is the Hessian of <g, y>, which is symmetric: one formula for both modes.


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [t if t.dtype == torch.float64 else t.float() for t in tensors]


def _jacobian_times(x: Tensor, h: Tensor, size, alpha, beta, k) -> Tensor:
    dtype = x.dtype
    x, h = _wide(x, h)
    d = k + alpha / size * window_sum(x * x, size)
    power = d**-beta
    return (h * power - 2 * alpha / size * beta * x * power / d * window_sum(x * h, size)).to(dtype)


def _hessian_times(x: Tensor, g: Tensor, h: Tensor, size, alpha, beta, k) -> Tensor:
    dtype, f = x.dtype, alpha / size
    x, g, h = _wide(x, g, h)
    d = k + f * window_sum(x * x, size)
    q = d ** (-beta - 1)
    change = 2 * f * window_sum(x * h, size)  # of d
    of_sum = window_sum(g * h * q - (beta + 1) * g * x * q / d * change, size, mirrored=True)
    result = -beta * g * q * change - 2 * f * beta * (h * window_sum(g * x * q, size, mirrored=True) + x * of_sum)
    return result.to(dtype)


def _save(tensors: int):
    def setup(ctx, inputs, output):
        ctx.constants = inputs[tensors:]
        ctx.save_for_backward(*inputs[:tensors])
        ctx.save_for_forward(*inputs[:tensors])

    return setup


def _backward(ctx, grad):
    gradient = torch.ops.fastcv.local_response_norm_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return gradient, None, None, None, None


def _jvp(ctx, tangent, *_):
    return _jacobian_times(*ctx.saved_tensors, tangent, *ctx.constants)


def _backward_of_backward(ctx, grad):
    of_output, input = ctx.saved_tensors
    first = _jacobian_times(input, grad, *ctx.constants) if ctx.needs_input_grad[0] else None
    second = _hessian_times(input, of_output, grad, *ctx.constants) if ctx.needs_input_grad[1] else None
    return first, second, None, None, None, None


def _jvp_of_backward(ctx, d_grad, d_input, *_):
    of_output, input = ctx.saved_tensors
    terms = [] if d_input is None else [_hessian_times(input, of_output, d_input, *ctx.constants)]
    if d_grad is not None:
        terms.append(torch.ops.fastcv.local_response_norm_backward(d_grad, input, *ctx.constants))
    return sum(terms[1:], terms[0])


register_autograd("local_response_norm", setup_context=_save(1), backward=_backward, jvp=_jvp)
register_autograd(
    "local_response_norm_backward", setup_context=_save(2), backward=_backward_of_backward, jvp=_jvp_of_backward
)


# ---- vmap: the mapped dimension joins the images ---------------------------------------------------


def _vmap(operator, tensors: int):
    def run(info, in_dims, *arguments):
        size = info.batch_size
        folded = [front(t, d, size).flatten(0, 1) for t, d in zip(arguments[:tensors], in_dims, strict=False)]
        return operator(*folded, *arguments[tensors:]).unflatten(0, (size, -1)), 0

    return run


torch.library.register_vmap("fastcv::local_response_norm", _vmap(torch.ops.fastcv.local_response_norm, 1), lib=LIBRARY)
torch.library.register_vmap(
    "fastcv::local_response_norm_backward", _vmap(torch.ops.fastcv.local_response_norm_backward, 2), lib=LIBRARY
)
