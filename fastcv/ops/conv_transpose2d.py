"""Transposed convolution with a fused epilogue: :func:`conv_transpose2d`.

In float32 on the CPU it runs on fastcv's kernels, channels-last; a contiguous input is converted, and its result back.
Other types and devices run on torch's transposed convolution, followed by the epilogue; so do weights that are being
trained on the CPU. What :mod:`fastcv.ops.conv2d` says of prepared weights and of kernels in Triton holds here too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import reference
from .._library import LIBRARY, define
from ._autocast import any_enabled, autocast
from ._autograd import needs_derivatives
from ._checks import check_floating, check_groups, check_one_of, check_same_device, check_shape, pair
from ._convolution import (
    ACTIVATIONS,
    call_key,
    calls,
    on_kernels,
    on_triton,
    register_convolution,
    remember_call,
    tracing,
)
from ._layouts import kept_layout
from ._vmap import register_image_vmap
from .conv2d import conv2d

# In the order of TransposedKernel in csrc/conv_transpose2d/conv_transpose2d_plan.h.
KERNELS = (
    "gemm",
    "winograd",
    "depthwise",
    "grouped",
    "torch",
    "winograd_2x2",
    "merged",
    "bf16",
    "pixel",
    "winograd_3x3",
    "amx",
    "pixel_gemv",
)

_GEOMETRY = "int groups, SymInt[2] stride, SymInt[2] padding, SymInt[2] output_padding, SymInt[2] dilation"
_reference = reference.conv_transpose2d
define(
    "conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? prepared, "
    f"{_GEOMETRY}, str activation, float slope, str kernel) -> Tensor",
    _reference.conv_transpose2d,
    triton=True,
    torch_has_kernel=True,
)
define(
    f"conv_transpose2d_prepare(Tensor input, Tensor weight, {_GEOMETRY}, str kernel) -> Tensor",
    _reference.conv_transpose2d_prepare,
    triton=True,
    torch_has_kernel=True,
    timed=False,
)
define(
    f"conv_transpose2d_kernel(Tensor input, Tensor weight, {_GEOMETRY}) -> int",
    _reference.conv_transpose2d_kernel,
    triton=True,
    torch_has_kernel=True,
    timed=False,
)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    kernel: str = "auto",
) -> Tensor:
    """``activation(conv_transpose(input, weight, bias) + residual)``, in one pass over the output.

    The outputs of each phase (position modulo stride) are a small convolution of the input with every stride-th element
    of the kernel, written to every stride-th pixel (sub-pixel convolution: Shi et al., CVPR 2016, section 3.1), so that
    no zeros between pixels are multiplied and no intermediate map is made.

    Args:
        input: ``[N, C, H, W]``, any floating type (the CPU's kernels: float32), contiguous or channels-last.
        weight: ``[C, K / groups, KH, KW]``, of the input's type, but under autocast.
        bias: ``[K]``, as the weight.
        stride, padding, output_padding, groups, dilation: as in :func:`torch.nn.functional.conv_transpose2d`.
        residual: of the output's shape, added before the activation.
        activation: ``"none"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"silu"``, ``"hardswish"``,
            ``"hardsigmoid"``, ``"sigmoid"``, ``"gelu"`` or ``"tanh"``.
        negative_slope: of ``"leaky_relu"``.
        kernel: which kernel computes it: ``"auto"``, or for measurements ``"gemm"``, ``"winograd"``,
            ``"winograd_3x3"`` or ``"winograd_2x2"`` (phases of up to 3x3 taps), ``"grouped"`` (phases 3 wide, groups
            of few channels), ``"merged"`` (phases as columns of one product), ``"depthwise"``, ``"pixel"`` (inputs of
            one pixel), ``"pixel_gemv"`` (few of them), ``"bf16"`` or ``"amx"`` (operands rounded to bfloat16), or
            ``"torch"``, which ``"auto"`` leaves strides above 1 in groups of less than 16 outputs to.

    Returns:
        ``[N, K, OH, OW]`` in the input's memory format, with
        ``OH = (H - 1) * stride - 2 * padding + dilation * (KH - 1) + output_padding + 1``. Differentiable with respect
        to all tensors, in both modes, twice. Under autocast it has its type, as torch's; on the CPU it is computed in
        float32.

        In a graph of ``torch.compile`` weights are laid out at every call. With ``backend="fastcv"``, and in what
        :func:`fastcv.accelerate` returns, they are laid out once.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or device, or an empty output.
        RuntimeError: a kernel that does not serve this convolution, a residual not of the output's shape, weight
            or bias not of the input's type.

    Example:
        >>> import torch, fastcv
        >>> x, w = torch.tensor([[[[2.0, 1], [4, 4]]]]), torch.tensor([[[[1.0, 4, 1], [1, 4, 3], [3, 3, 1]]]])
        >>> fastcv.ops.conv_transpose2d(x, w)[0, 0]
        tensor([[ 2.,  9.,  6.,  1.],
                [ 6., 29., 30.,  7.],
                [10., 29., 33., 13.],
                [12., 24., 16.,  4.]])
    """
    if any_enabled():
        result = autocast(
            conv_transpose2d, dict(input=input, weight=weight, bias=bias, residual=residual), stride=stride,
            padding=padding, output_padding=output_padding, groups=groups, dilation=dilation, activation=activation,
            negative_slope=negative_slope, kernel=kernel,
        )  # fmt: skip
        if result is not None:
            return result
    options = (stride, padding, output_padding, groups, dilation, activation, kernel)
    key = call_key(input, weight, bias, residual, ("conv_transpose2d", *options))
    call: _Call | None = calls.get(key)
    if call is None:
        geometry = _check(input, weight, bias, residual, *options)
        if not on_kernels(input, weight, bias, residual) and not on_triton(kernel, input, weight, bias, residual):
            return _reference.conv_transpose2d(
                input, weight, bias, residual, None, *geometry, activation, negative_slope, ""
            )
        if tracing():  # weights stand for others
            return torch.ops.fastcv.conv_transpose2d(
                input, weight, bias, residual, None, *geometry, activation, negative_slope, kernel
            )
        call = _make_call(input, weight, geometry, kernel)
        remember_call(key, call)
    geometry, chosen, layout = call
    rest = (*geometry, activation, negative_slope)
    trains = kernel == "auto" and weight.requires_grad and torch.is_grad_enabled()
    if trains and chosen == "auto":  # Triton's
        return torch.ops.fastcv.conv_transpose2d(input, weight, bias, residual, None, *rest, chosen)
    if trains or chosen == "torch":
        return _reference.conv_transpose2d(input, weight, bias, residual, None, *rest, "")
    prepared = kept_layout(
        weight, layout,
        lambda weight: torch.ops.fastcv.conv_transpose2d_prepare(input.detach(), weight, *geometry, chosen),
    )  # fmt: skip
    if needs_derivatives(input, weight, bias, residual):
        return torch.ops.fastcv.conv_transpose2d(input, weight, bias, residual, prepared, *rest, chosen)
    with torch._C._AutoDispatchBelowAutograd():  # the way through Python would take as long as a small layer
        return _run_prepared(input, weight, bias, residual, prepared, *rest, chosen)


_run_prepared = torch.ops.fastcv.conv_transpose2d.default


class _Call(NamedTuple):
    geometry: tuple[int, list[int], list[int], list[int], list[int]]  # groups, stride, paddings, dilation
    kernel: str
    layout: tuple  # by which the prepared weight is kept


def _make_call(input: Tensor, weight: Tensor, geometry, kernel: str) -> _Call:
    if kernel == "auto":
        number = torch.ops.fastcv.conv_transpose2d_kernel(input, weight, *geometry)
        kernel = KERNELS[number] if number >= 0 else kernel  # Triton's have no names
    groups, stride, padding, output_padding, dilation = geometry
    # Which kernel serves a phase may depend on its padding as well, but only where the phase is dilated.
    pads = () if dilation == [1, 1] else (*padding, *output_padding)
    return _Call(geometry, kernel, ("transposed", kernel, groups, *stride, *dilation, *pads))


def _check(
    input, weight, bias, residual, stride, padding, output_padding, groups, dilation, activation, kernel
) -> tuple:
    """Raises where arguments do not fit; else groups, stride, padding, output padding and dilation as numbers."""
    check_floating("input", input)
    check_shape("input", input, ("N", "C", "H", "W"))
    check_floating("weight", weight)
    check_shape("weight", weight, (input.shape[1], "K / groups", "KH", "KW"))
    check_groups(groups)
    if input.shape[1] % groups:
        raise ValueError(f"groups: expected a divisor of {input.shape[1]} channels, got {groups}")
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (weight.shape[1] * groups,))
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None:
            check_same_device(name, tensor, "input", input)
    check_one_of("activation", activation, ACTIVATIONS)
    check_one_of("kernel", kernel, ("auto", *KERNELS))
    stride, dilation = list(pair("stride", stride)), list(pair("dilation", dilation))
    padding = list(pair("padding", padding, minimum=0))
    output_padding = list(pair("output_padding", output_padding, minimum=0))
    for extra, s, d in zip(output_padding, stride, dilation, strict=True):
        if extra >= s and extra >= d:
            raise ValueError(f"output_padding: expected less than stride or dilation, {max(s, d)}, got {extra}")
    size = _output_size(input, weight, stride, padding, output_padding, dilation)
    if size[0] < 1 or size[1] < 1 or input.shape[2] < 1 or input.shape[3] < 1:
        raise ValueError(f"input: expected a size that gives an output, got {list(input.shape)} for one of {size}")
    return groups, stride, padding, output_padding, dilation


def _output_size(input, weight, stride, padding, output_padding, dilation) -> list[int]:
    options = zip(input.shape[2:], weight.shape[2:], stride, padding, output_padding, dilation, strict=True)
    return [(n - 1) * s - 2 * p + d * (k - 1) + 1 + extra for n, k, s, p, extra, d in options]


# ---- fake kernels --------------------------------------------------------------------------------


@torch.library.register_fake("fastcv::conv_transpose2d", lib=LIBRARY)
def _(
    input, weight, bias, residual, prepared, groups, stride, padding, output_padding, dilation,
    activation, slope, kernel,
):  # fmt: skip
    memory_format = torch._prims_common.suggest_memory_format(input)
    size = _output_size(input, weight, stride, padding, output_padding, dilation)
    shape = (input.shape[0], weight.shape[1] * groups, *size)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format)


@torch.library.register_fake("fastcv::conv_transpose2d_prepare", lib=LIBRARY)
def _(input, weight, groups, stride, padding, output_padding, dilation, kernel):
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size())


# ---- derivatives ---------------------------------------------------------------------------------


def _input_gradient(grad, input, weight, geometry, needs):
    """Weights at rest are laid out once for the convolution that the gradient of the input is."""
    if needs[1] or type(weight) not in (Tensor, nn.Parameter):
        return None
    groups, stride, padding, _, dilation = geometry
    with torch.autocast(grad.device.type, enabled=False):
        d_input = conv2d(grad, weight, None, stride, padding, dilation, groups)
    return d_input[:, :, : input.shape[2], : input.shape[3]]  # more where output_padding >= stride


register_convolution("conv_transpose2d", _input_gradient)
register_image_vmap("conv_transpose2d", 0, 3)
