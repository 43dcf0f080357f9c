"""How convolutions, linear layers and norms are written in steps of a program."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import ops
from ._arguments import arguments, only, two
from ._lower import CALLS, OPERATORS, Lowering, Unsupported, Value, handles
from ._modules import has_hooks, is_norm, is_plain_conv, is_plain_transposed
from ._steps import Affine, Ref, ref


@handles(nn.Conv2d)
def conv2d(to: Lowering, node: fx.Node) -> Value:
    conv = to.module(node)
    if not is_plain_conv(conv) or len(node.args) != 1 or node.kwargs:
        raise Unsupported
    geometry = (*conv.stride, *conv.padding, *conv.dilation, conv.groups)
    x = to.map(node.args[0])
    return to.step("conv", [x], 4, geometry, weight=ref(conv, "weight"), bias=ref(conv, "bias"))


@handles(nn.ConvTranspose2d)
def conv_transpose2d(to: Lowering, node: fx.Node) -> Value:
    conv = to.module(node)
    if not is_plain_transposed(conv) or len(node.args) != 1 or node.kwargs:
        raise Unsupported
    geometry = (*conv.stride, *conv.padding, *conv.output_padding, *conv.dilation, conv.groups)
    return _transposed(to, node.args[0], ref(conv, "weight"), ref(conv, "bias"), geometry)


@handles(F.conv_transpose2d, ops.conv_transpose2d)
def conv_transpose2d_function(to: Lowering, node: fx.Node) -> Value:
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    x, weight, bias, stride, padding, output_padding, groups, dilation = arguments(node, names)
    bias = None if bias is None else _weight(to, bias)
    geometry = (*two(stride or 1), *two(padding or 0), *two(output_padding or 0), *two(dilation or 1), groups or 1)
    return _transposed(to, x, _weight(to, weight), bias, geometry)


def _transposed(to: Lowering, x, weight: Ref, bias: Ref | None, geometry: tuple[int, ...]) -> Value:
    groups, (channels, outputs) = geometry[-1], weight.get().shape[:2]
    depthwise = groups == channels and outputs == 1
    if groups > 1 and outputs < 16 and not depthwise:
        raise Unsupported  # vectors hold the channels of one group, and torch those of several
    return to.step("conv_transpose", [to.map(x)], 4, geometry, weight=weight, bias=bias)


@handles(nn.Linear)
def linear(to: Lowering, node: fx.Node) -> Value:
    layer = to.module(node)
    if has_hooks(layer) or layer.weight.dtype != torch.float32:
        raise Unsupported
    x = to.value(only(node))
    if x.rank == 4:
        raise Unsupported  # over the last axis of a map
    return to.step("conv", [x], x.rank, (1, 1, 0, 0, 1, 1, 1), weight=ref(layer, "weight"), bias=ref(layer, "bias"))


@handles(F.conv2d, ops.conv2d)
def conv2d_function(to: Lowering, node: fx.Node) -> Value:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = arguments(node, names)
    weight = _weight(to, weight)
    bias = None if bias is None else _weight(to, bias)
    if isinstance(padding, str):
        raise Unsupported
    options = (1 if stride is None else stride, padding or 0, 1 if dilation is None else dilation)
    geometry = [n for option in options for n in two(option)]
    return to.step("conv", [to.map(x)], 4, (*geometry, groups or 1), weight=weight, bias=bias)


@handles(F.linear)
def linear_function(to: Lowering, node: fx.Node) -> Value:
    x, weight, bias = arguments(node, ("input", "weight", "bias"))
    weight, value = _weight(to, weight), to.value(x)
    bias = None if bias is None else _weight(to, bias)
    if value.rank == 4:
        raise Unsupported
    return to.step("conv", [value], value.rank, (1, 1, 0, 0, 1, 1, 1), weight=weight, bias=bias)


@handles(F.batch_norm)
def norm_function(to: Lowering, node: fx.Node) -> Value:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    x, mean, variance, weight, bias, training, _, eps = arguments(node, names)
    if training or mean is None or variance is None:
        raise Unsupported
    refs = [None if r is None else _weight(to, r) for r in (weight, bias, mean, variance)]
    return to.step("affine", [to.map(x)], 4, after=[Affine(refs=refs, eps=1e-5 if eps is None else eps)])


def _weight(to: Lowering, node) -> Ref:
    parameter = to.parameter(node)
    if parameter is None or parameter.ref.get().dtype != torch.float32:
        raise Unsupported
    return parameter.ref


def norm(to: Lowering, node: fx.Node) -> Value:
    layer = to.module(node)
    if not is_norm(layer):
        raise Unsupported
    return to.step("affine", [to.map(only(node))], 4, after=[Affine(layer)])


@handles(nn.LayerNorm)
def layer_norm(to: Lowering, node: fx.Node) -> Value:
    layer, x = to.module(node), to.value(only(node))
    if has_hooks(layer) or len(layer.normalized_shape) != 1 or x.rank == 4:
        raise Unsupported
    weights = {name: ref(layer, name) if layer.elementwise_affine else None for name in ("weight", "bias")}
    return to.step("layer_norm", [x], x.rank, (float(layer.eps),), **weights)


@handles(F.layer_norm)
def layer_norm_function(to: Lowering, node: fx.Node) -> Value:
    x, shape, weight, bias, eps = arguments(node, ("input", "normalized_shape", "weight", "bias", "eps"))
    x, weight, bias = to.value(x), to.parameter(weight), to.parameter(bias)
    if len(shape) != 1 or x.rank == 4 or weight is None or bias is None:
        raise Unsupported
    return to.step("layer_norm", [x], x.rank, (1e-5 if eps is None else float(eps),), weight=weight.ref, bias=bias.ref)


CALLS[nn.BatchNorm2d] = norm
OPERATORS[F.local_response_norm] = ops.local_response_norm, ()
OPERATORS[nn.LocalResponseNorm] = ops.local_response_norm, ("size", "alpha", "beta", "k")
