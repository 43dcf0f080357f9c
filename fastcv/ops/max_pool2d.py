"""Max pooling that remembers positions in a byte: :func:`max_pool2d`.

Defined on every path alike:

* NaN wins, the last one of a window; equal maxima go to the first pixel in reading order, as in torch;
* a window without a pixel of the map (dilation may step over a small one) raises;
* gradients of overlapping windows are added up in one order, whatever the number of threads.

Where a gradient is wanted and the indices are not, it keeps compact ones, an eighth of torch's, and not the input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define
from ._autograd import needs_derivatives, register_autograd
from ._checks import check_one_of
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
    plain,
    pooled_size,
    torch_is_faster,
    window,
)

_WINDOW = ", ".join(f"SymInt {name}_{axis}" for name in ("kernel", "stride", "padding", "dilation") for axis in "hw")
define(
    f"max_pool2d(Tensor input, {_WINDOW}, bool ceil_mode, int index_bytes) -> (Tensor, Tensor)",
    reference.max_pool2d.max_pool2d,
    triton=True,
)
define(
    f"max_unpool2d(Tensor input, Tensor indices, SymInt height, SymInt width, {_WINDOW}, bool sum) -> Tensor",
    reference.max_pool2d.max_unpool2d,
    triton=True,
)
define(
    f"max_unpool2d_backward(Tensor grad, Tensor indices, {_WINDOW}, bool sum) -> Tensor",
    reference.max_pool2d.max_unpool2d_backward,
    triton=True,
)
_max_pool2d = torch.ops.fastcv.max_pool2d.default
_max_unpool2d = torch.ops.fastcv.max_unpool2d.default
_max_unpool2d_backward = torch.ops.fastcv.max_unpool2d_backward.default

# Bound here, so that a program may put ours in their place.
_torch_values, _torch_with_indices = torch.max_pool2d, torch._C._nn.max_pool2d_with_indices

_MOST_COMPACT = 255


class PooledIndices(NamedTuple):
    """Where the maxima of :func:`max_pool2d` were, a byte for each, with what unpooling needs to know."""

    positions: Tensor
    """uint8, of the pooled shape: ``i * KW + j``, the element of its window (in ONNX graphs int64, flat as torch's)."""
    input_size: tuple[int, int]
    """Height and width before pooling."""
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def window(self) -> list[int]:
        return [*self.kernel_size, *self.stride, *self.padding, *self.dilation]

    def flat(self) -> Tensor:
        """torch's indices: int64, ``y * W + x`` in the plane."""
        if self.positions.dtype == torch.int64:
            return self.positions
        return reference.max_pool2d.flat(self.positions, self.window, self.input_size[1])


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    indices: str = "int64",
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, PooledIndices]:
    """The maximum of each window: :func:`torch.nn.functional.max_pool2d`, with indices of a byte on request.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``, any floating type, contiguous or channels-last.
        kernel_size, stride, padding, dilation, ceil_mode: as in torch; an int or one for rows and one for columns.
        return_indices: also return where the maxima were.
        indices: ``"int64"``, flat positions in the plane as torch has them, or ``"compact"``, :class:`PooledIndices`:
            positions in the window, uint8, together with the input's size. Windows of up to 255 elements.

    Returns:
        ``[N, C, OH, OW]`` in the input's dtype and memory format; with ``return_indices`` also the indices, in the same
        format. Differentiable in both modes, twice; gradients are bit-equal for any number of threads.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or value.
        RuntimeError: a dilated window that steps over the whole map.

    Source: Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, section 2.1.

    Example:
        >>> import torch, fastcv
        >>> x = torch.tensor([[1., 2, 6, 3], [3, 5, 2, 1], [1, 2, 2, 1], [7, 3, 4, 8]])[None, None]
        >>> values, switches = fastcv.ops.max_pool2d(x, 2, return_indices=True, indices="compact")
        >>> values[0, 0], switches.positions[0, 0]
        (tensor([[5., 6.],
                [7., 8.]]), tensor([[3, 0],
                [2, 3]], dtype=torch.uint8))
        >>> fastcv.ops.max_unpool2d(torch.tensor([[1., 2], [3, 4]])[None, None], switches)[0, 0]
        tensor([[0., 0., 2., 0.],
                [0., 1., 0., 0.],
                [0., 0., 0., 0.],
                [3., 0., 0., 4.]])
    """
    if indices == "int64" and torch_is_faster("max", input, kernel_size, stride, padding, dilation):
        pool = _torch_with_indices if return_indices else _torch_values
        return pool(input, kernel_size, kernel_size if stride is None else stride, padding, dilation, ceil_mode)
    check_map(input)
    w = window(kernel_size, stride, padding, dilation)
    check_fits(input, w, ceil_mode)
    if indices != "int64":
        check_one_of("indices", indices, ("int64", "compact"))
    compact = w[0] * w[1] <= _MOST_COMPACT
    if return_indices and indices == "compact" and not compact:
        raise ValueError(
            f'indices: compact ones serve windows of up to {_MOST_COMPACT} elements, got {w[0]} x {w[1]}; use "int64"'
        )
    if torch.compiler.is_compiling() and in_onnx_export():
        values, positions = F.max_pool2d(input, w[:2], w[2:4], w[4:6], w[6:], ceil_mode, return_indices=True)
        return _result(values, positions, w, input, return_indices, indices)
    x = input if input.dim() == 4 else input[None]
    smallest = 1 if compact else 8
    if return_indices:
        index_bytes = 1 if indices == "compact" else 8
        values, positions = call(_max_pool2d, x, *w, ceil_mode, index_bytes)
    elif not plain():
        values, positions = _max_pool2d(x, *w, ceil_mode, smallest if torch.is_grad_enabled() else 0)
    elif needs_derivatives(x):
        values, positions = _max_pool2d(x, *w, ceil_mode, smallest)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            values, positions = _max_pool2d(x, *w, ceil_mode, 0)
    if input.dim() == 3:
        values, positions = values[0], positions[0] if return_indices else positions
    return _result(values, positions, w, input, return_indices, indices) if return_indices else values


def _result(values, positions, w, input, return_indices, indices):
    if not return_indices:
        return values
    if indices == "int64":
        return values, positions
    kernel_size, stride, padding, dilation = (tuple(w[i : i + 2]) for i in (0, 2, 4, 6))
    return values, PooledIndices(positions, tuple(input.shape[-2:]), kernel_size, stride, padding, dilation)


# ---- fake kernels --------------------------------------------------------------------------------


@torch.library.register_fake("fastcv::max_pool2d", lib=LIBRARY)
def _(input, *rest):
    *window, ceil_mode, index_bytes = rest
    size = (*input.shape[:2], *(pooled_size(input.shape[2 + d], d, window, ceil_mode) for d in (0, 1)))
    if index_bytes == 0:
        return like(input, size), input.new_empty(0, dtype=torch.uint8)
    return like(input, size), like(input, size, torch.uint8 if index_bytes == 1 else torch.int64)


@torch.library.register_fake("fastcv::max_unpool2d", lib=LIBRARY)
def _(input, indices, height, width, *rest):
    return like(input, (*input.shape[:2], height, width))


@torch.library.register_fake("fastcv::max_unpool2d_backward", lib=LIBRARY)
def _(grad, indices, *rest):
    return like(grad, tuple(indices.shape))


# ---- derivatives: pooling selects, unpooling is the transpose of a selection ---------------------------


def _setup_pool(ctx, inputs, output):
    input, *ctx.window, ctx.ceil_mode, ctx.index_bytes = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.size = input.shape[2:]
    ctx.channels_last = is_channels_last(input)
    kept = output[1] if ctx.index_bytes else input  # without indices they are found again
    ctx.save_for_backward(kept)
    ctx.save_for_forward(kept)


def _positions(ctx):
    (kept,) = ctx.saved_tensors
    if ctx.index_bytes:
        return kept
    smallest = 1 if ctx.window[0] * ctx.window[1] <= _MOST_COMPACT else 8
    return _max_pool2d(kept.detach(), *ctx.window, ctx.ceil_mode, smallest)[1]


def _backward_of_pool(ctx, grad, _):
    if grad is None:
        return (None,) * 11
    gradient = call(_max_unpool2d, in_format(grad, ctx.channels_last), _positions(ctx), *ctx.size, *ctx.window, True)
    return gradient, *[None] * 10


def _jvp_of_pool(ctx, tangent, *_):
    return _max_unpool2d_backward(tangent, _positions(ctx), *ctx.window, True), None


def _setup_unpool(ctx, inputs, output):
    _, indices, ctx.height, ctx.width, *ctx.window, ctx.sum = inputs
    ctx.save_for_backward(indices)
    ctx.save_for_forward(indices)


def _backward_of_unpool(ctx, grad):
    return call(_max_unpool2d_backward, grad, *ctx.saved_tensors, *ctx.window, ctx.sum), *[None] * 12


def _jvp_of_unpool(ctx, tangent, *_):
    return _max_unpool2d(tangent, *ctx.saved_tensors, ctx.height, ctx.width, *ctx.window, ctx.sum)


def _setup_gather(ctx, inputs, output):
    grad, indices, *ctx.window, ctx.sum = inputs
    ctx.size = grad.shape[2:]
    ctx.save_for_backward(indices)
    ctx.save_for_forward(indices)


def _backward_of_gather(ctx, grad):
    return _max_unpool2d(grad, *ctx.saved_tensors, *ctx.size, *ctx.window, ctx.sum), *[None] * 10


def _jvp_of_gather(ctx, tangent, *_):
    return _max_unpool2d_backward(tangent, *ctx.saved_tensors, *ctx.window, ctx.sum)


register_autograd("max_pool2d", setup_context=_setup_pool, backward=_backward_of_pool, jvp=_jvp_of_pool)
register_autograd("max_unpool2d", setup_context=_setup_unpool, backward=_backward_of_unpool, jvp=_jvp_of_unpool)
register_autograd(
    "max_unpool2d_backward", setup_context=_setup_gather, backward=_backward_of_gather, jvp=_jvp_of_gather
)

for _op in (_max_pool2d, _max_unpool2d, _max_unpool2d_backward):
    torch.library.register_vmap(_op.name(), fold_images(_op), lib=LIBRARY)
