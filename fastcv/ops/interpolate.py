"""Resampling of feature maps: :func:`interpolate`.

The gradient is a sum over outputs for each input, in one order, and so the same at every run and for any number of
threads (torch's throws under ``torch.use_deterministic_algorithms`` for bilinear maps on CUDA).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define
from ._autograd import register_autograd
from ._checks import check_floating, check_shape, pair
from ._rois import front

_CONSTANTS = "float scale_h, float scale_w, str mode, bool align_corners"
define(
    f"interpolate(Tensor input, SymInt[2] output_size, {_CONSTANTS}) -> Tensor",
    reference.interpolate.interpolate,
    triton=True,
)
define(
    f"interpolate_backward(Tensor grad, SymInt[2] input_size, {_CONSTANTS}) -> Tensor",
    reference.interpolate.interpolate_backward,
    triton=True,
)

MODES = ("nearest", "bilinear", "bed_of_nails")


def interpolate(
    input: Tensor,
    size: int | tuple[int, int] | None = None,
    scale_factor: float | tuple[float, float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
) -> Tensor:
    """Resample maps to another size, as :func:`torch.nn.functional.interpolate` for the modes that are here.

    Args:
        input: ``[N, C, H, W]``, any floating type, contiguous or channels-last, with at least one pixel.
        size: of the output, ``OH`` (for both) or ``(OH, OW)``.
        scale_factor: a number or two, instead of ``size``, which is then ``floor(H * scale_factor)``; coordinates
            follow from the factor.
        mode: ``"nearest"``, ``"bilinear"``, or ``"bed_of_nails"``: each value at the upper left of its block of
            outputs, zeros elsewhere; sizes must be multiples of the input's.
        align_corners: for bilinear: True maps the centres of corner pixels to each other, False (the default) corners
            to corners.

    Returns:
        ``[N, C, OH, OW]`` in the input's dtype and memory format. Differentiable in both modes, twice. Bit-equal for
        any number of threads. Beside infinite pixels bilinear results may be infinite where torch has NaN (0 * inf).

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or range; both or neither of ``size`` and
            ``scale_factor``; another mode of torch's.

    Example:
        >>> import torch, fastcv
        >>> x = torch.tensor([[1., 2.], [3., 4.]])[None, None]
        >>> fastcv.ops.interpolate(x, scale_factor=2)[0, 0]
        tensor([[1., 1., 2., 2.],
                [1., 1., 2., 2.],
                [3., 3., 4., 4.],
                [3., 3., 4., 4.]])
        >>> fastcv.ops.interpolate(x, 4, mode="bed_of_nails")[0, 0]
        tensor([[1., 0., 2., 0.],
                [0., 0., 0., 0.],
                [3., 0., 4., 0.],
                [0., 0., 0., 0.]])
    """
    check_floating("input", input)
    check_shape("input", input, ("N", "C", "H", "W"))
    height, width = input.shape[2:]
    if height == 0 or width == 0:
        raise ValueError(f"input: expected at least one pixel, got {list(input.shape)}")
    if mode not in MODES:
        raise ValueError(f'mode: expected "nearest", "bilinear" or "bed_of_nails", got {mode!r}')
    if align_corners is not None and mode != "bilinear":
        raise ValueError(f'align_corners: expected None for mode "{mode}", got {align_corners!r}')
    if (size is None) == (scale_factor is None):
        raise ValueError("size, scale_factor: expected one of them")
    if size is not None:
        output_size, scales = pair("size", size), (0.0, 0.0)
    else:
        scales = _scales(scale_factor)
        output_size = [math.floor(n * s) for n, s in zip((height, width), scales, strict=True)]
        if min(output_size) < 1:
            raise ValueError(f"scale_factor: expected an output of at least one pixel, got {output_size}")
    if mode == "bed_of_nails" and (output_size[0] % height or output_size[1] % width):
        raise ValueError(
            f"{'size' if size is not None else 'scale_factor'}: expected a multiple of {height} x {width} for "
            f"bed_of_nails, got {output_size[0]} x {output_size[1]}"
        )
    return torch.ops.fastcv.interpolate(input, output_size, *scales, mode, bool(align_corners))


def _scales(scale_factor) -> tuple[float, float]:
    both = (scale_factor,) * 2 if isinstance(scale_factor, (int, float)) else scale_factor
    ok = isinstance(both, (list, tuple)) and len(both) == 2
    if not ok or any(not isinstance(s, (int, float)) or not 0 < s < math.inf for s in both):
        raise ValueError(f"scale_factor: expected a positive number or a pair of them, got {scale_factor!r}")
    return float(both[0]), float(both[1])


# ---- fake kernels --------------------------------------------------------------------------------


def _resized(x, size, *constants):
    memory_format = torch._prims_common.suggest_memory_format(x)
    return torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=memory_format)


torch.library.register_fake("fastcv::interpolate", _resized, lib=LIBRARY)
torch.library.register_fake("fastcv::interpolate_backward", _resized, lib=LIBRARY)


# ---- derivatives and vmap: both operators are linear, and each is the other's transpose -----------------


def _setup(ctx, inputs, output):
    ctx.size = inputs[0].shape[2:]
    ctx.constants = inputs[1:]


def _backward(ctx, grad):
    size = list(ctx.size)
    return torch.ops.fastcv.interpolate_backward(grad, size, *ctx.constants[1:]), *[None] * 5


def _backward_of_backward(ctx, grad):
    return torch.ops.fastcv.interpolate(grad, list(ctx.size), *ctx.constants[1:]), *[None] * 5


for _name, _gradient in (("interpolate", _backward), ("interpolate_backward", _backward_of_backward)):
    _operator = getattr(torch.ops.fastcv, _name)

    def _jvp(ctx, tangent, *_, operator=_operator):
        return operator(tangent, *ctx.constants)

    def _vmap(info, in_dims, x, *constants, operator=_operator):
        folded = front(x, in_dims[0], info.batch_size).flatten(0, 1)
        return operator(folded, *constants).unflatten(0, (info.batch_size, -1)), 0

    register_autograd(_name, setup_context=_setup, backward=_gradient, jvp=_jvp)
    torch.library.register_vmap(f"fastcv::{_name}", _vmap, lib=LIBRARY)
