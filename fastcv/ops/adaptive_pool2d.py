"""Pooling to a given size: :func:`adaptive_avg_pool2d`, :func:`adaptive_max_pool2d`, :func:`spatial_pyramid_pool`.

As in torch, bin ``o`` of ``bins`` has the pixels ``floor(o * size / bins)`` to ``ceil((o + 1) * size / bins)``,
exclusive, so that bins may share a pixel. Of maxima NaN wins, the last one of a bin, and of equals the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define
from ._autograd import register_autograd
from ._checks import as_int, check_one_of
from ._pooling import call, check_map, fold_images, in_format, in_onnx_export, is_channels_last, like, torch_is_faster
from .max_pool2d import _max_unpool2d, _max_unpool2d_backward

define(
    "adaptive_avg_pool2d(Tensor input, SymInt height, SymInt width) -> Tensor",
    reference.adaptive_pool2d.adaptive_avg_pool2d,
    triton=True,
)
define(
    "adaptive_avg_pool2d_backward(Tensor grad, SymInt height, SymInt width) -> Tensor",
    reference.adaptive_pool2d.adaptive_avg_pool2d_backward,
    triton=True,
)
define(
    "adaptive_max_pool2d(Tensor input, SymInt height, SymInt width) -> (Tensor, Tensor)",
    reference.adaptive_pool2d.adaptive_max_pool2d,
    triton=True,
)
_avg = torch.ops.fastcv.adaptive_avg_pool2d.default
_avg_backward = torch.ops.fastcv.adaptive_avg_pool2d_backward.default
_max = torch.ops.fastcv.adaptive_max_pool2d.default
# Bound here, so that a program may put ours in their place.
_torch_avg, _torch_max = torch._C._nn.adaptive_avg_pool2d, torch._C._nn.adaptive_max_pool2d

OutputSize = int | None | tuple[int | None, int | None]
_ANYWHERE = [1, 1, 1, 1, 0, 0, 1, 1]  # windows of one pixel: indices point where they like


def _bins(input: Tensor, output_size: OutputSize) -> tuple[int, int]:
    check_map(input)
    height, width = input.shape[-2:]
    if height < 1 or width < 1:
        raise ValueError(f"input: expected at least one pixel, got {height} x {width}")
    if type(output_size) is int and output_size >= 0:
        return output_size, output_size
    both = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    bins = [size if b is None else as_int(b) for b, size in zip(both, (height, width), strict=False)]
    if len(both) != 2 or any(b is None or b < 0 for b in bins):
        raise ValueError(f"output_size: expected an int or a pair of ints or None, 0 or more, got {output_size!r}")
    return tuple(bins)


def adaptive_avg_pool2d(input: Tensor, output_size: OutputSize) -> Tensor:
    """The mean of each of ``output_size`` bins: :func:`torch.nn.functional.adaptive_avg_pool2d`.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``, any floating type, contiguous or channels-last.
        output_size: bins, ``OH`` or ``(OH, OW)``; None for as many as there are pixels. 1 takes the mean of each map.

    Returns:
        ``[N, C, OH, OW]`` in the input's dtype and memory format. Differentiable in both modes, twice; bit-equal for
        any number of threads.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or value.

    Source: Lin, Chen, Yan, "Network in network", ICLR 2014, section 3.2 (global average pooling).

    Example:
        >>> import torch, fastcv
        >>> fastcv.ops.adaptive_avg_pool2d(torch.arange(9.).reshape(1, 1, 3, 3), 2).flatten()
        tensor([2., 3., 5., 6.])
    """
    small = type(output_size) is int and output_size > 0 and torch_is_faster("adaptive", input)
    if small and (output_size > 1 or input.requires_grad):  # the mean of a map is as fast here
        return _torch_avg(input, output_size)
    size = _bins(input, output_size)
    if torch.compiler.is_compiling() and in_onnx_export():
        return F.adaptive_avg_pool2d(input, size)
    return call(_avg, input, *size) if input.dim() == 4 else call(_avg, input[None], *size)[0]


def adaptive_max_pool2d(
    input: Tensor, output_size: OutputSize, return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The maximum of each of ``output_size`` bins: :func:`torch.nn.functional.adaptive_max_pool2d`.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``, any floating type, contiguous or channels-last.
        output_size: bins, ``OH`` or ``(OH, OW)``; None for as many as there are pixels.
        return_indices: also return where the maxima were: int64, ``y * W + x``.

    Returns:
        ``[N, C, OH, OW]`` in the input's dtype and memory format, and the indices. Differentiable in both modes, twice;
        bit-equal for any number of threads.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or value.

    Source: He et al., "Spatial pyramid pooling in deep convolutional networks", ECCV 2014, section 2.2.

    Example:
        >>> import torch, fastcv
        >>> fastcv.ops.adaptive_max_pool2d(torch.arange(9.).reshape(1, 1, 3, 3), 2).flatten()
        tensor([4., 5., 7., 8.])
    """
    if type(output_size) is int and output_size > 0 and torch_is_faster("adaptive", input):
        result = _torch_max(input, output_size)
        return result if return_indices else result[0]
    size = _bins(input, output_size)
    if torch.compiler.is_compiling() and in_onnx_export():
        return F.adaptive_max_pool2d(input, size, return_indices)
    if input.dim() == 4:
        values, indices = call(_max, input, *size)
    else:
        values, indices = (t[0] for t in call(_max, input[None], *size))
    return (values, indices) if return_indices else values


def spatial_pyramid_pool(input: Tensor, levels: Sequence[int] = (4, 2, 1), mode: str = "max") -> Tensor:
    """The maxima or means of grids of several sizes, as one vector of fixed length for maps of any size.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``, any floating type, contiguous or channels-last.
        levels: bins along each axis, a grid ``l x l`` for each level.
        mode: ``"max"`` or ``"avg"``.

    Returns:
        ``[N, C * sum(l * l)]``: level after level, in each the channels' grids row by row. Differentiable in both
        modes, twice; bit-equal for any number of threads.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or value.

    Source: He et al., "Spatial pyramid pooling in deep convolutional networks", ECCV 2014, section 2.2.

    Example:
        >>> import torch, fastcv
        >>> fastcv.ops.spatial_pyramid_pool(torch.arange(16.).reshape(1, 1, 4, 4), (2, 1))
        tensor([[ 5.,  7., 13., 15., 15.]])
    """
    check_one_of("mode", mode, ("max", "avg"))
    if len(levels) == 0 or any(type(level) is not int or level < 1 for level in levels):
        raise ValueError(f"levels: expected ints of at least 1, got {levels!r}")
    pool = adaptive_max_pool2d if mode == "max" else adaptive_avg_pool2d
    return torch.cat([pool(input, level).flatten(-3) for level in levels], -1)


# ---- fake kernels --------------------------------------------------------------------------------


@torch.library.register_fake("fastcv::adaptive_avg_pool2d", lib=LIBRARY)
def _(input, height, width):
    return like(input, (*input.shape[:2], height, width))


@torch.library.register_fake("fastcv::adaptive_avg_pool2d_backward", lib=LIBRARY)
def _(grad, height, width):
    return like(grad, (*grad.shape[:2], height, width))


@torch.library.register_fake("fastcv::adaptive_max_pool2d", lib=LIBRARY)
def _(input, height, width):
    size = (*input.shape[:2], height, width)
    return like(input, size), like(input, size, torch.int64)


# ---- derivatives ---------------------------------------------------------------------------------


def _setup_sizes(ctx, inputs, output):
    """Of a linear operator and its transpose: the two sizes."""
    ctx.size, ctx.output_size = inputs[0].shape[2:], output.shape[2:]
    ctx.channels_last = is_channels_last(inputs[0])


def _backward_of_avg(ctx, grad):
    return call(_avg_backward, in_format(grad, ctx.channels_last), *ctx.size), None, None


def _jvp_of_avg(ctx, tangent, *_):
    return _avg(tangent, *ctx.output_size)


def _backward_of_backward(ctx, grad):
    return _avg(grad, *ctx.size), None, None


def _jvp_of_backward(ctx, tangent, *_):
    return _avg_backward(tangent, *ctx.output_size)


def _setup_max(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.size = inputs[0].shape[2:]
    ctx.channels_last = is_channels_last(inputs[0])
    ctx.save_for_backward(output[1])
    ctx.save_for_forward(output[1])


def _backward_of_max(ctx, grad, _):
    if grad is None:
        return None, None, None
    return (
        _max_unpool2d(in_format(grad, ctx.channels_last), *ctx.saved_tensors, *ctx.size, *_ANYWHERE, True),
        None,
        None,
    )


def _jvp_of_max(ctx, tangent, *_):
    return _max_unpool2d_backward(tangent, *ctx.saved_tensors, *_ANYWHERE, True), None


register_autograd("adaptive_avg_pool2d", setup_context=_setup_sizes, backward=_backward_of_avg, jvp=_jvp_of_avg)
register_autograd(
    "adaptive_avg_pool2d_backward", setup_context=_setup_sizes, backward=_backward_of_backward, jvp=_jvp_of_backward
)
register_autograd("adaptive_max_pool2d", setup_context=_setup_max, backward=_backward_of_max, jvp=_jvp_of_max)
for _op in (_avg, _avg_backward, _max):
    torch.library.register_vmap(_op.name(), fold_images(_op), lib=LIBRARY)
