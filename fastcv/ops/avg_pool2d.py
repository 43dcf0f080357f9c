"""Average pooling: :func:`avg_pool2d`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define
from ._autograd import register_autograd
from ._checks import as_int
from ._pooling import (
    Size,
    call,
    check_fits,
    check_map,
    fold_images,
    in_format,
    in_onnx_export,
    is_channels_last,
    like,
    pooled_size,
    torch_is_faster,
    window,
)

_WINDOW = ", ".join(f"SymInt {name}_{axis}" for name in ("kernel", "stride", "padding") for axis in "hw")
define(
    f"avg_pool2d(Tensor input, {_WINDOW}, bool ceil_mode, bool count_include_pad, int divisor) -> Tensor",
    reference.avg_pool2d.avg_pool2d,
    triton=True,
)
define(
    f"avg_pool2d_backward(Tensor grad, SymInt height, SymInt width, {_WINDOW}, bool count_include_pad, "
    "int divisor) -> Tensor",
    reference.avg_pool2d.avg_pool2d_backward,
    triton=True,
)
_avg_pool2d = torch.ops.fastcv.avg_pool2d.default
_avg_pool2d_backward = torch.ops.fastcv.avg_pool2d_backward.default
_torch_avg_pool2d = torch._C._nn.avg_pool2d  # bound here, so that a program may put ours in its place


def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The mean of each window: :func:`torch.nn.functional.avg_pool2d`.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``, any floating type, contiguous or channels-last.
        kernel_size, stride, padding, ceil_mode: as in torch; an int or one for rows and one for columns.
        count_include_pad: whether the zeros of the padding count; what stands out of the padding never does.
        divisor_override: divides the sum instead, if given; not 0.

    Returns:
        ``[N, C, OH, OW]`` in the input's dtype and memory format. Differentiable in both modes, twice; bit-equal for
        any number of threads.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or value.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998, section II.B (subsampling).

    Example:
        >>> import torch, fastcv
        >>> fastcv.ops.avg_pool2d(torch.arange(16.).reshape(1, 1, 4, 4), 2)[0, 0]
        tensor([[ 2.5000,  4.5000],
                [10.5000, 12.5000]])
    """
    if divisor_override is None and torch_is_faster("avg", input, kernel_size, stride, padding):
        stride = kernel_size if stride is None else stride
        return _torch_avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad)
    check_map(input)
    w = window(kernel_size, stride, padding, reach=False)
    check_fits(input, w, ceil_mode)
    w = w[:6]
    divisor = 0 if divisor_override is None else as_int(divisor_override)
    if divisor is None or (divisor == 0 and divisor_override is not None):
        raise ValueError(f"divisor_override: expected an int other than 0, got {divisor_override!r}")
    if torch.compiler.is_compiling() and in_onnx_export():
        return F.avg_pool2d(input, w[:2], w[2:4], w[4:], ceil_mode, count_include_pad, divisor or None)
    rest = (*w, ceil_mode, count_include_pad, divisor)
    return call(_avg_pool2d, input, *rest) if input.dim() == 4 else call(_avg_pool2d, input[None], *rest)[0]


@torch.library.register_fake("fastcv::avg_pool2d", lib=LIBRARY)
def _(input, *rest):
    *window, ceil_mode, _, _ = rest
    window += [1, 1]
    return like(input, (*input.shape[:2], *(pooled_size(input.shape[2 + d], d, window, ceil_mode) for d in (0, 1))))


@torch.library.register_fake("fastcv::avg_pool2d_backward", lib=LIBRARY)
def _(grad, height, width, *rest):
    return like(grad, (*grad.shape[:2], height, width))


# ---- derivatives: both are linear -----------------------------------------------------------------


def _setup(ctx, inputs, output):
    input, *ctx.window, ctx.ceil_mode, ctx.include_pad, ctx.divisor = inputs
    ctx.size = input.shape[2:]
    ctx.channels_last = is_channels_last(input)


def _backward(ctx, grad):
    grad = in_format(grad, ctx.channels_last)
    gradient = call(_avg_pool2d_backward, grad, *ctx.size, *ctx.window, ctx.include_pad, ctx.divisor)
    return gradient, *[None] * 9


def _jvp(ctx, tangent, *_):
    return _avg_pool2d(tangent, *ctx.window, ctx.ceil_mode, ctx.include_pad, ctx.divisor)


def _setup_backward(ctx, inputs, output):
    grad, ctx.height, ctx.width, *ctx.window, ctx.include_pad, ctx.divisor = inputs
    size = (ctx.height, ctx.width)
    floor = [pooled_size(size[d], d, [*ctx.window, 1, 1], False) for d in (0, 1)]
    ctx.ceil_mode = floor != list(grad.shape[2:])


def _backward_of_backward(ctx, grad):
    return _avg_pool2d(grad, *ctx.window, ctx.ceil_mode, ctx.include_pad, ctx.divisor), *[None] * 10


def _jvp_of_backward(ctx, tangent, *_):
    return _avg_pool2d_backward(tangent, ctx.height, ctx.width, *ctx.window, ctx.include_pad, ctx.divisor)


register_autograd("avg_pool2d", setup_context=_setup, backward=_backward, jvp=_jvp)
register_autograd(
    "avg_pool2d_backward", setup_context=_setup_backward, backward=_backward_of_backward, jvp=_jvp_of_backward
)
for _op in (_avg_pool2d, _avg_pool2d_backward):
    torch.library.register_vmap(_op.name(), fold_images(_op), lib=LIBRARY)
