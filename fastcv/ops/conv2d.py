"""Convolution with a fused epilogue: :func:`conv2d`.

In float32 on the CPU it runs on fastcv's kernels, channels-last; a contiguous input is converted, and its result back.
Other types and devices run on torch's convolution, followed by the epilogue; CUDA devices, where ``FASTCV_TRITON``
asks for it, on kernels in Triton, in all floating types and with all gradients.

Weights are laid out for their kernel once, and kept while the weight tensor lives and is not changed: an optimiser's
step or ``load_state_dict`` is noticed (by ``Tensor._version``), writing in place through ``.data`` or NumPy is not.
Weights that are being trained (that need a gradient, with gradients enabled) change at every step: they are laid out at
each call and not kept, on the CPU where the convolution gains more than that takes (3x3, stride 1, pixels enough), and
run on torch's convolution elsewhere. So does the gradient of the input; those of weight and bias are torch's there.
Shapes alone decide, not the number of threads, of which results must not depend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define, implementation
from ._autocast import any_enabled, autocast
from ._autograd import needs_derivatives
from ._checks import check_floating, check_groups, check_one_of, check_same_device, check_shape, pair
from ._conv2d_training import input_gradient, training_kernel
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

KERNELS = (
    *("gemm", "winograd", "depthwise", "grouped", "torch", "winograd_2x2", "gemv", "bf16"),
    *("winograd_6x6", "winograd_5x5", "winograd_5x5_4x4", "winograd_3x3", "amx"),
)

_GEOMETRY = "int groups, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation"
define(
    f"conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? prepared, {_GEOMETRY}, "
    "str activation, float slope, str kernel) -> Tensor",
    reference.conv2d.conv2d,
    triton=True,
    torch_has_kernel=True,
)
define(
    f"conv2d_prepare(Tensor weight, {_GEOMETRY}, str kernel) -> Tensor",
    reference.conv2d.conv2d_prepare,
    triton=True,
    torch_has_kernel=True,
    timed=False,
)
LIBRARY.define(
    "conv2d_prepared(Tensor input, Tensor prepared, Tensor? bias, Tensor? residual, int[] code, float slope) -> Tensor"
)
define(
    f"conv2d_kernel(Tensor input, Tensor weight, {_GEOMETRY}) -> int",
    reference.conv2d.conv2d_kernel,
    triton=True,
    torch_has_kernel=True,
    timed=False,
)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    kernel: str = "auto",
) -> Tensor:
    """``activation(conv(input, weight, bias) * scale + shift + residual)``, in one pass over the output.

    Source of the Winograd kernels: Lavin and Gray, "Fast algorithms for convolutional neural networks", CVPR 2016.

    Args:
        input: ``[N, C, H, W]``, any floating type (the CPU's kernels: float32), contiguous or channels-last.
        weight: ``[K, C / groups, KH, KW]``, of the input's type, but under autocast.
        bias: ``[K]``, as the weight.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`; padding also ``"valid"`` or, with
            stride 1, ``"same"``, for which kernels of even reach pad a copy of the input.
        scale, shift: ``[K]``, such as a batch norm's; they are folded into weights and bias at every call, so fold them
            yourself where they do not change.
        residual: of the output's shape, added before the activation.
        activation: ``"none"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"silu"``, ``"hardswish"``,
            ``"hardsigmoid"``, ``"sigmoid"``, ``"gelu"`` or ``"tanh"``.
        negative_slope: of ``"leaky_relu"``.
        kernel: which kernel computes it: ``"auto"``, or for measurements ``"gemm"``, ``"gemv"``, ``"winograd"``,
            ``"winograd_3x3"`` or ``"winograd_2x2"`` (up to 3x3, stride 1), ``"winograd_6x6"`` (3x3, stride 1),
            ``"winograd_5x5"`` or ``"winograd_5x5_4x4"`` (5x5, stride 1), ``"depthwise"``, ``"grouped"``, ``"bf16"``
            or, on processors with AMX, ``"amx"`` (operands rounded to bfloat16), or ``"torch"``.
            ``"auto"`` takes none of ``"bf16"``, ``"amx"``, ``"winograd_6x6"`` and ``"winograd_5x5_4x4"``, which are
            less exact. On other devices than the CPU all but ``"auto"`` are torch's.

    Returns:
        ``[N, K, OH, OW]`` in the input's memory format. Differentiable with respect to all tensors, in both modes,
        twice.

        Under autocast the result has its type, as torch's convolution; on the CPU it is computed in float32.

        In a graph of ``torch.compile`` weights are laid out at every call. With ``backend="fastcv"``, and in what
        :func:`fastcv.accelerate` returns, they are laid out once.

        Rounding errors in float32, as measured (no proof): at most 1e-5 of the largest output (most 2e-6) where the
        magnitude of pixels and weights does not vary much; with the less exact kernels 5e-5. With scales from 1e-6 to
        1e6, outliers and sparse filters: at most ``c * S``, with ``S`` the sum over channels of ``max |x|``, of the
        input pixels of the output's tile (at most 6 x 6, less exact 8 x 8), times the sum of ``|w|`` over the filter;
        c is 3e-6, less exact 1e-5. So a large, infinite or NaN pixel disturbs all outputs of its tiles. Kernels without
        Winograd: at most 5e-6 of the output's own sum of ``|x| |w|``. Those in Triton are made for the same, which is
        not yet measured, unless ``torch.backends.cuda.matmul.fp32_precision`` is ``"tf32"``; half types they sum in
        float32, and round once.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or device.
        RuntimeError: a kernel that does not serve this convolution, an input smaller than the kernel, a residual not of
            the output's shape, weight or bias not of the input's type.

    Example:
        >>> import torch, fastcv
        >>> x, w = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
        >>> fastcv.ops.conv2d(x, w, torch.tensor([-5.0]), padding=1, activation="relu")[0, 0]
        tensor([[0., 1., 0.],
                [1., 4., 1.],
                [0., 1., 0.]])
    """
    if any_enabled():
        tensors = dict(input=input, weight=weight, bias=bias, scale=scale, shift=shift, residual=residual)
        result = autocast(
            conv2d, tensors, stride=stride, padding=padding, dilation=dilation, groups=groups, activation=activation,
            negative_slope=negative_slope, kernel=kernel,
        )  # fmt: skip
        if result is not None:
            return result
    options = (stride, padding, dilation, groups, activation, kernel)
    simple = scale is None and shift is None
    key = call_key(input, weight, bias, residual, ("conv2d", *options)) if simple else None
    call: _Call | None = calls.get(key)
    if call is None:
        geometry = _check(input, weight, bias, residual, scale, shift, *options)
        if scale is not None:
            weight = weight * scale[:, None, None, None]
            bias = None if bias is None else bias * scale
        if shift is not None:
            bias = shift if bias is None else bias + shift
        uneven = _uneven(weight, geometry[3]) if padding == "same" else (0, 0)
        if any(uneven):
            return conv2d(
                F.pad(input, (0, uneven[1], 0, uneven[0])), weight, bias, 1, tuple(geometry[2]), dilation, groups,
                residual=residual, activation=activation, negative_slope=negative_slope, kernel=kernel,
            )  # fmt: skip
        if not on_kernels(input, weight, bias, residual) and not on_triton(kernel, input, weight, bias, residual):
            return reference.conv2d.conv2d(
                input, weight, bias, residual, None, *geometry, activation, negative_slope, ""
            )
        if tracing():  # weights stand for others
            return torch.ops.fastcv.conv2d(
                input, weight, bias, residual, None, *geometry, activation, negative_slope, kernel
            )
        call = _make_call(input, weight, geometry, activation, kernel)
        if call is None:
            # Not of weights that change at each step, nor for a plan, which may choose torch's kernel.
            trains = weight.requires_grad and torch.is_grad_enabled()
            keeps = not trains and implementation("conv2d", "cuda") != "plan"
            prepared = prepared_weight(weight, *geometry, kernel) if keeps else None
            return torch.ops.fastcv.conv2d(
                input, weight, bias, residual, prepared, *geometry, activation, negative_slope, kernel
            )
        remember_call(key, call)
    geometry, chosen, code = call
    if kernel == "auto" and weight.requires_grad and torch.is_grad_enabled():
        return _train(input, weight, bias, residual, geometry, activation, negative_slope)
    if chosen == "torch":
        return reference.conv2d.conv2d(input, weight, bias, residual, None, *geometry, activation, negative_slope, "")
    prepared = prepared_weight(weight, *geometry, chosen)
    if needs_derivatives(input, weight, bias, residual):
        return torch.ops.fastcv.conv2d(
            input, weight, bias, residual, prepared, *geometry, activation, negative_slope, chosen
        )
    with torch._C._AutoDispatchBelowAutograd():  # the way through Python would take as long as a small layer
        return _run_prepared(input, prepared, bias, residual, code, negative_slope)


_run_prepared = torch.ops.fastcv.conv2d_prepared.default


class _Call(NamedTuple):
    geometry: tuple[int, list[int], list[int], list[int]]  # groups, stride, padding, dilation
    kernel: str
    code: list[int]  # of conv2d_prepared


def _make_call(input: Tensor, weight: Tensor, geometry, activation: str, kernel: str) -> _Call | None:
    """None for Triton's kernels, which have no names."""
    if kernel == "auto":
        number = torch.ops.fastcv.conv2d_kernel(input, weight, *geometry)
        if number < 0:
            return None
        kernel = KERNELS[number]
    groups, stride, padding, dilation = geometry
    outputs, _, *size = weight.shape
    numbers = KERNELS.index(kernel), ACTIVATIONS.index(activation), groups
    return _Call(geometry, kernel, [*numbers, *stride, *padding, *dilation, outputs, *size])


def _check(input, weight, bias, residual, scale, shift, stride, padding, dilation, groups, activation, kernel) -> tuple:
    """Raises where arguments do not fit; else groups, stride, padding and dilation as numbers."""
    check_floating("input", input)
    check_shape("input", input, ("N", "C", "H", "W"))
    check_floating("weight", weight)
    check_groups(groups)
    check_shape("weight", weight, ("K", input.shape[1] // groups, "KH", "KW"))
    if input.shape[1] % groups or weight.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of {input.shape[1]} and {weight.shape[0]} channels, got {groups}")
    for name, vector in (("bias", bias), ("scale", scale), ("shift", shift)):
        if vector is not None:
            check_floating(name, vector)
            check_shape(name, vector, (weight.shape[0],))
    others = {"weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual}
    for name, tensor in others.items():
        if tensor is not None:
            check_same_device(name, tensor, "input", input)
    check_one_of("activation", activation, ACTIVATIONS)
    check_one_of("kernel", kernel, ("auto", *KERNELS))
    stride, dilation = list(pair("stride", stride)), list(pair("dilation", dilation))
    return groups, stride, _padding(padding, weight.shape[2:], stride, dilation), dilation


def _train(input: Tensor, weight: Tensor, bias, residual, geometry, activation: str, slope: float) -> Tensor:
    """The activation stays outside of the operator, whose derivative would compute the convolution again for it."""
    kernel = training_kernel(input, weight, geometry)
    if kernel == "torch":
        return reference.conv2d.conv2d(input, weight, bias, residual, None, *geometry, activation, slope, "")
    result = torch.ops.fastcv.conv2d(input, weight, bias, None, None, *geometry, "none", 0.0, kernel)
    if residual is not None:
        result = result + residual
    return reference.conv2d.ACTIVATIONS[activation](result, slope)


def _padding(padding, size, stride, dilation) -> list[int]:
    if padding == "valid":
        return [0, 0]
    if padding == "same":
        if any(s != 1 for s in stride):
            raise ValueError(f'padding: "same" needs stride 1, got stride {stride}')
        return [d * (k - 1) // 2 for d, k in zip(dilation, size, strict=True)]
    return list(pair("padding", padding, minimum=0))


def _uneven(weight: Tensor, dilation) -> tuple[int, ...]:
    """Rows and columns that "same" pads below and right more than above and left."""
    return tuple(d * (k - 1) % 2 for d, k in zip(dilation, weight.shape[2:], strict=True))


def prepared_weight(weight: Tensor, groups: int, stride, padding, dilation, kernel: str) -> Tensor:
    """``weight`` laid out for ``kernel``, from the cache where it was not changed since."""

    def prepare(weight: Tensor) -> Tensor:
        return torch.ops.fastcv.conv2d_prepare(weight, groups, stride, padding, dilation, kernel)

    return kept_layout(weight, (kernel, groups), prepare)


# ---- fake kernels --------------------------------------------------------------------------------


@torch.library.register_fake("fastcv::conv2d", lib=LIBRARY)
def _(input, weight, bias, residual, prepared, groups, stride, padding, dilation, activation, slope, kernel):
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    memory_format = torch._prims_common.suggest_memory_format(input)
    shape = (input.shape[0], weight.shape[0], *size)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format)


@torch.library.register_fake("fastcv::conv2d_prepare", lib=LIBRARY)
def _(weight, groups, stride, padding, dilation, kernel):
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size())


register_convolution("conv2d", input_gradient)
register_image_vmap("conv2d", 0, 3)
register_image_vmap("conv2d_input_gradient", 0)
