"""How layers and functions of torch are written in steps of a program; those with weights are in _weighted.py."""

from __future__ import annotations

import operator
import sys

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import ops
from ._arguments import arguments, layer_arguments, only, two
from ._lower import CALLS, Grouped, Indices, Lowering, Unsupported, Value, handles
from ._modules import has_hooks, kind
from ._steps import Affine, ref
from ._weighted import norm

# ---- activations ---------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": (nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"),
    "relu6": (nn.ReLU6, F.relu6),
    "leaky_relu": (nn.LeakyReLU, F.leaky_relu),
    "silu": (nn.SiLU, F.silu),
    "hardswish": (nn.Hardswish, F.hardswish),
    "hardsigmoid": (nn.Hardsigmoid, F.hardsigmoid),
    "sigmoid": (nn.Sigmoid, F.sigmoid, torch.sigmoid, "sigmoid"),
    "gelu": (nn.GELU, F.gelu),
    "tanh": (nn.Tanh, F.tanh, torch.tanh, "tanh"),
}
_NAMES = {target: name for name, targets in ACTIVATIONS.items() for target in targets}


@handles(*_NAMES)
def activation(to: Lowering, node: fx.Node) -> Value:
    options = dict(node.kwargs)
    options.pop("inplace", None)
    slope = options.pop("negative_slope", 0.01)
    if options.pop("approximate", "none") != "none" or options:
        raise Unsupported
    target = node.target
    if node.op == "call_module":
        module = to.module(node)
        target, slope = kind(module), getattr(module, "negative_slope", 0.01)
        if has_hooks(module) or getattr(module, "approximate", "none") != "none":
            raise Unsupported
    elif len(node.args) > 1:
        if _NAMES[target] != "leaky_relu" or not isinstance(node.args[1], float):
            raise Unsupported
        slope = node.args[1]
    x = to.value(node.args[0])
    return to.step("activate", [x], x.rank, activation=_NAMES[target], slope=float(slope))


@handles(nn.PReLU)
def prelu(to: Lowering, node: fx.Node) -> Value:
    layer, x = to.module(node), to.value(only(node))
    if has_hooks(layer) or x.rank == -4:
        raise Unsupported
    channels = to.shape(node.args[0])[1]
    return to.step("prelu", [x], x.rank, weight=ref(layer, "weight"), channels=channels)


# ---- arithmetic ----------------------------------------------------------------------------------


@handles(operator.add, operator.iadd, torch.add, operator.mul, operator.imul, torch.mul, "add", "add_", "mul", "mul_")
def arithmetic(to: Lowering, node: fx.Node) -> Value:
    if len(node.args) != 2 or node.kwargs:
        raise Unsupported
    op = "mul" if "mul" in str(getattr(node.target, "__name__", node.target)) else "add"
    a, b = node.args
    for x, other in ((a, b), (b, a)):
        parameter = to.parameter(other)
        if op == "mul" and parameter is not None and isinstance(x, fx.Node):
            return _scale(to, node, x, parameter)
    if not all(isinstance(x, fx.Node) and "shape" in x.meta for x in (a, b)):
        raise Unsupported
    size = to.shape(node)
    if to.shape(a) != size:
        a, b = b, a
        if to.writes(node):
            raise Unsupported
    one = len(size) == 4 and to.shape(b) == (*size[:2], 1, 1)
    if to.shape(a) != size or not (to.shape(b) == size or one):
        raise Unsupported
    x, y = to.value(a), to.value(b)
    if x.rank != y.rank or (one and x.rank != 4):
        raise Unsupported
    return to.step(op, [x, y], x.rank, (1,) if to.shape(b) != size else ())


def _scale(to: Lowering, node: fx.Node, x: fx.Node, parameter) -> Value:
    """A parameter for each channel of a map."""
    value, shape = to.value(x), parameter.ref.get().shape
    channels = to.shape(x)[1 if value.rank == 4 else -1]
    wanted = [(channels, 1, 1), (1, channels, 1, 1)] if value.rank == 4 else [(channels,)]
    if tuple(shape) not in wanted or to.shape(node) != to.shape(x):
        raise Unsupported
    return to.step("affine", [value], value.rank, after=[Affine(refs=[parameter.ref])])


# ---- pooling and resizing ------------------------------------------------------------------------


_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices", "indices")
_AVG_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


@handles(nn.MaxPool2d, F.max_pool2d, F.max_pool2d_with_indices, torch.max_pool2d, ops.max_pool2d)
def max_pool2d(to: Lowering, node: fx.Node) -> Value | tuple[Value, Indices]:
    x, kernel, stride, padding, dilation, ceil_mode, indices, form = layer_arguments(to, node, _MAX_POOL)
    indices = bool(indices) or node.target is F.max_pool2d_with_indices
    kernel, stride = two(kernel), two(stride or kernel)
    padding, dilation = two(padding or 0), two(dilation or 1)
    params = (*kernel, *stride, *padding, *dilation, int(indices), int(bool(ceil_mode)))
    if not indices:
        return to.step("max_pool", [to.map(x)], 4, params)
    side_by_side = kernel == stride and padding == (0, 0) and dilation == (1, 1) and kernel[0] * kernel[1] <= 256
    if not (to.with_indices and side_by_side) or any(user.target is not operator.getitem for user in node.users):
        raise Unsupported
    pooled, channels = to.map(x), to.shape(x)[1]
    both = to.step("max_pool", [pooled], 4, params)
    values = to.step("slice", [both], 4, (0, channels))
    return values, Indices(
        to.step("slice", [both], 4, (channels, -(-channels // 4))), pooled, kernel, form == "compact"
    )


_MAX_UNPOOL = ("kernel_size", "stride", "padding")


@handles(nn.MaxUnpool2d, F.max_unpool2d, ops.max_unpool2d)
def max_unpool2d(to: Lowering, node: fx.Node) -> Value:
    if node.op == "call_module":
        layer = to.module(node)
        x, indices, size = arguments(node, ("input", "indices", "output_size"))
        kernel, stride, padding = (getattr(layer, name) for name in _MAX_UNPOOL)
        if has_hooks(layer):
            raise Unsupported
    else:
        x, indices, kernel, stride, padding, size = arguments(node, ("input", "indices", *_MAX_UNPOOL, "output_size"))
    held = to.segment.nodes.get(indices)
    if not isinstance(held, Indices):
        raise Unsupported
    kernel = held.kernel if kernel is None else two(kernel)
    if not kernel == two(stride or kernel) == held.kernel or two(padding or 0) != (0, 0):
        raise Unsupported
    inputs, params = [to.map(x), held.value, held.pooled], [*held.kernel, 0, 0]
    if isinstance(size, fx.Node):
        if not _is_shape(size):
            raise Unsupported
        inputs.append(to.map(size.args[0]))
    elif size is not None:
        params[2:] = two(tuple(size)[-2:])
    elif held.compact:
        inputs.append(held.pooled)
    return to.step("max_unpool", inputs, 4, params)


@handles(nn.AvgPool2d, F.avg_pool2d, ops.avg_pool2d)
def avg_pool2d(to: Lowering, node: fx.Node) -> Value:
    x, kernel, stride, padding, ceil_mode, include, divisor = layer_arguments(to, node, _AVG_POOL)
    if divisor is not None:
        raise Unsupported
    include = True if include is None else include
    sizes = (*two(kernel), *two(stride or kernel), *two(padding or 0), 1, 1)
    return to.step("avg_pool", [to.map(x)], 4, (*sizes, int(include), int(bool(ceil_mode))))


@handles(nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, ops.adaptive_avg_pool2d)
def adaptive_avg_pool2d(to: Lowering, node: fx.Node) -> Value:
    x, size = layer_arguments(to, node, ("output_size",))
    size = size if isinstance(size, (tuple, list)) else (size, size)
    if not all(n is None or type(n) is int for n in size):
        raise Unsupported
    return to.step("adaptive_avg_pool", [to.map(x)], 4, [n or 0 for n in size])


@handles("mean", torch.mean)
def mean(to: Lowering, node: fx.Node) -> Value:
    x, dim, keepdim = arguments(node, ("input", "dim", "keepdim"))
    value = to.map(x)
    if not isinstance(dim, (tuple, list)) or sorted(d % 4 for d in dim) != [2, 3]:
        raise Unsupported
    pooled = to.step("adaptive_avg_pool", [value], 4, (1, 1))
    return pooled if keepdim else to.step("flatten", [pooled], 2)


@handles(F.interpolate, ops.interpolate, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
def interpolate(to: Lowering, node: fx.Node) -> Value:
    names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    x, size, factor, mode, align, recompute, antialias = layer_arguments(to, node, names)
    mode = mode or "nearest"
    if mode not in ("nearest", "bilinear") or recompute or antialias:
        raise Unsupported
    value, rest = to.map(x), [int(mode == "bilinear"), int(bool(align))]
    if factor is not None:
        pair = (factor, factor) if isinstance(factor, (int, float)) else tuple(factor)
        return to.step("resize", [value], 4, (*rest, 2, 0, 0, *(float(f) for f in pair)))
    if isinstance(size, fx.Node):
        return to.step("resize", [value, _whose_size(to, size)], 4, (*rest, 1, 0, 0, 0.0, 0.0))
    return to.step("resize", [value], 4, (*rest, 0, *two(size), 0.0, 0.0))


def _whose_size(to: Lowering, node: fx.Node) -> Value:
    """The map of which ``node`` is ``x.shape[-2:]`` or ``x.size()[2:]``."""
    if (
        node.op == "call_function"
        and node.target is operator.getitem
        and node.args[1] in (slice(-2, None), slice(2, None))
    ):
        source = node.args[0]
        if isinstance(source, fx.Node) and _is_shape(source):
            return to.map(source.args[0])
    raise Unsupported


def _is_shape(node: fx.Node) -> bool:
    attribute = node.op == "call_function" and node.target is getattr and node.args[1] == "shape"
    return attribute or (node.op == "call_method" and node.target == "size" and len(node.args) == 1)


# ---- joining and rearranging ---------------------------------------------------------------------


@handles(torch.cat, torch.concat)
def cat(to: Lowering, node: fx.Node) -> Value:
    tensors, dim = arguments(node, ("tensors", "dim"))
    if dim is None and node.kwargs.get("axis") is not None:
        dim = node.kwargs["axis"]
    if dim not in (1, -3) or not isinstance(tensors, (list, tuple)):
        raise Unsupported
    values = [to.map(x) for x in tensors]
    return to.step("cat", values, 4) if len(values) > 1 else values[0]


@handles("chunk", torch.chunk)
def chunk(to: Lowering, node: fx.Node) -> tuple[Value, ...]:
    x, chunks, dim = arguments(node, ("input", "chunks", "dim"))
    value, channels = to.map(x), to.shape(x)[1]
    if dim != 1 or any(user.target is not operator.getitem for user in node.users):
        raise Unsupported
    size = -(-channels // chunks)
    return tuple(
        to.step("slice", [value], 4, (first, min(size, channels - first))) for first in range(0, channels, size)
    )


@handles(operator.getitem)
def getitem(to: Lowering, node: fx.Node) -> Value | Indices:
    source, index = node.args
    pieces = to.segment.nodes.get(source)
    if not isinstance(pieces, tuple) or type(index) is not int:
        raise Unsupported
    return pieces[index]


@handles(torch.flatten, "flatten", nn.Flatten)
def flatten(to: Lowering, node: fx.Node) -> Value:
    x, start, end = layer_arguments(to, node, ("start_dim", "end_dim"))
    value = to.value(x)
    if start != 1 or end not in (None, -1, 3) or value.rank == -4:
        raise Unsupported
    return value if value.rank == 2 else to.step("flatten", [value], 2)


@handles("view", "reshape", torch.reshape)
def view(to: Lowering, node: fx.Node) -> Value | Grouped:
    x = node.args[0]
    held, after = to.segment.nodes.get(x), to.shape(node)
    if isinstance(held, Grouped):
        if held.exchanged and len(after) == 4 and held.groups == 2:
            made = next(s for s in to.segment.listing.steps if s.output == held.value.id)
            if made.op == "cat" and len(made.inputs) == 2:
                return to.step("interleave", [held.value, held.value], 4)
        raise Unsupported
    value, before = to.value(x), to.shape(x)
    if value.rank == 4 and len(after) == 5 and after[0] == before[0] and after[3:] == before[2:]:
        return Grouped(value, after[1])
    # The batch must be asked for, or the other size left open: two numbers may fit one image only.
    open_ended = len(node.args) == 3 and (node.args[2] == -1 or isinstance(node.args[1], fx.Node))
    if value.rank == 4 and len(after) == 2 and after[0] == before[0] and open_ended:
        return to.step("flatten", [value], 2)
    raise Unsupported


@handles("transpose", torch.transpose)
def transpose(to: Lowering, node: fx.Node) -> Grouped:
    held = to.segment.nodes.get(node.args[0])
    if not isinstance(held, Grouped) or held.exchanged or tuple(node.args[1:]) not in ((1, 2), (2, 1)):
        raise Unsupported
    return Grouped(held.value, held.groups, exchanged=True)


@handles("permute", torch.permute)
def permute(to: Lowering, node: fx.Node) -> Value:
    return _permuted(to, node.args[0], node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:])


def permute_module(to: Lowering, node: fx.Node) -> Value:
    return _permuted(to, node.args[0], to.module(node).dims)


def _permuted(to: Lowering, x: fx.Node, dims) -> Value:
    value, dims = to.value(x), tuple(dims)
    wanted = {4: (0, 2, 3, 1), -4: (0, 3, 1, 2)}.get(value.rank)
    if dims != wanted:
        raise Unsupported
    return Value(value.id, -value.rank)


# ---- nothing to do -------------------------------------------------------------------------------


@handles(nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, "contiguous", "clone")
def same(to: Lowering, node: fx.Node) -> Value | Grouped:
    held = to.segment.nodes.get(node.args[0])
    return held if isinstance(held, Grouped) else to.value(node.args[0])


@handles(F.dropout, F.dropout2d)
def dropout(to: Lowering, node: fx.Node) -> Value:
    x, _, training = arguments(node, ("input", "p", "training"))
    if training is not False:
        raise Unsupported
    return to.value(x)


def stochastic_depth(to: Lowering, node: fx.Node) -> Value:
    x, _, _, training = arguments(node, ("input", "p", "mode", "training"))
    if training is not False:
        raise Unsupported
    return to.value(x)


def add_torchvision() -> None:
    """torchvision's own names for these, where a model can hold them."""
    torchvision = sys.modules.get("torchvision")
    if hasattr(torchvision, "ops"):
        CALLS[torchvision.ops.stochastic_depth] = stochastic_depth
        CALLS[torchvision.ops.misc.FrozenBatchNorm2d] = norm
        CALLS[torchvision.ops.misc.Permute] = permute_module
