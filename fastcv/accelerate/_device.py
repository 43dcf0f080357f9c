"""A program on the device of its inputs: each step is a call of fastcv's operators or of torch's.

It stands for ``csrc/program``, which serves the CPU. Weights are laid out once, when it is loaded: norms are folded in
in float64, and they are channels-last, in the type of the maps. All maps are channels-last, vectors maps of one pixel.
Nothing here waits for the device, so that a program may be recorded as a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops._convolution import on_triton
from ..ops.max_pool2d import PooledIndices
from ._steps import Affine, Listing, Ref, Step

Call = Callable[..., Tensor]  # of a step: its inputs to its output


def as_channels_last(x: Tensor) -> Tensor:
    """With those strides also where other ones mean the same (one channel, one pixel), by which operators would see a
    contiguous map."""
    _, c, h, w = x.shape
    strides = (h * w * c, 1, w * c, c)
    if x.stride() == strides:
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


class OnDevice:
    """The steps of a listing as calls, with weights on ``device`` and maps of ``dtype``."""

    def __init__(self, listing: Listing, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._inputs, self._outputs, self._values = list(listing.inputs), list(listing.outputs), listing.values
        weights = _Weights(dtype)
        last = {value: i for i, step in enumerate(listing.steps) for value in step.inputs}
        kept = {value for value, _ in listing.outputs}
        self._steps: list[tuple[Call, list[int], int, list[int]]] = []
        # Inference tensors count no changes: operators could not keep what they lay out of them.
        with torch.inference_mode(False), torch.no_grad():
            for i, step in enumerate(listing.steps):
                dead = [value for value in dict.fromkeys(step.inputs) if last[value] == i and value not in kept]
                self._steps.append((_MAKERS[step.op](step, weights), list(step.inputs), step.output, dead))

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs in float32 as ``csrc/program`` has them: dense, channels-last, none in the memory of another."""
        with torch.no_grad():
            values: list = [None] * self._values
            for i, (x, rank) in enumerate(zip(inputs, self._inputs, strict=True)):
                values[i] = self._as_map(x, rank)
            for call, sources, output, dead in self._steps:
                values[output] = call(*[values[i] for i in sources])
                for i in dead:
                    values[i] = None
            taken, results = {x.untyped_storage().data_ptr() for x in inputs}, []
            for value, rank in self._outputs:
                result = _as_output(values[value], rank)
                place = result.untyped_storage().data_ptr()
                results.append(result.clone() if place in taken else result)
                taken.add(place)
            return tuple(results)

    def _as_map(self, x: Tensor, rank: int) -> Tensor:
        if x.dtype != torch.float32 or x.dim() != (2 if rank == 2 else 4):
            raise RuntimeError(
                f"inputs: expected float32 of {2 if rank == 2 else 4} dimensions, got {x.dtype} of {x.dim()}"
            )
        x = x[:, :, None, None] if rank == 2 else x.permute(0, 3, 1, 2) if rank == -4 else x
        return as_channels_last(x.to(self.dtype, memory_format=torch.channels_last))


def _as_output(x: Tensor, rank: int) -> Tensor:
    x = as_channels_last(x.float())
    return x[:, :, 0, 0] if rank == 2 else x.permute(0, 2, 3, 1) if rank == -4 else x


# ---- weights -------------------------------------------------------------------------------------


class _Weights:
    """What is laid out of parameters, once for all steps that use the same ones."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self._kept: dict[tuple, tuple[Tensor | None, ...]] = {}

    def kept(self, what: str, refs: list[Ref | None], rest: tuple, make: Callable[[], tuple]) -> tuple:
        """``make()`` in the type of the maps, the same for the same parameters."""
        key = (what, *(None if r is None else r.key for r in refs), *rest)
        if key not in self._kept:
            self._kept[key] = tuple(None if t is None else self._laid(t) for t in make())
        return self._kept[key]

    def _laid(self, t: Tensor) -> Tensor:
        t = t.detach().to(self.dtype)  # which may be a parameter itself: when it changes, the program is loaded again
        return as_channels_last(t) if t.dim() == 4 else t.contiguous()

    def of_convolution(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the norms that follow."""

        def fold():
            weight, (scale, shift) = step.weight.get().detach(), step.folded()
            if weight.dim() == 2:
                weight = weight[:, :, None, None]
            if scale is not None and step.op == "conv":
                weight = weight.double() * scale[:, None, None, None]
            elif scale is not None:  # [C, K / groups, KH, KW]: outputs of a group along the second axis
                groups = step.params[8]
                weight = (weight.double().unflatten(0, (groups, -1)) * scale.view(groups, 1, -1, 1, 1)).flatten(0, 1)
            return weight, shift

        refs = [step.weight, step.bias, *(r for a in step.after for r in a.parts)]
        rest = (step.params[-1], *(a.eps for a in step.after))
        return self.kept(step.op, refs, rest, fold)

    def of_affine(self, affine: Affine) -> tuple[Tensor, Tensor]:
        """Scale and shift, for maps."""
        return self.kept(
            "affine", affine.parts, (affine.eps,), lambda: [t[None, :, None, None] for t in affine.values()]
        )


# ---- steps ---------------------------------------------------------------------------------------

_MAKERS: dict[str, Callable[[Step, _Weights], Call]] = {}  # by the name of the step, as in OPS


def _makes(op: str):
    def register(maker):
        _MAKERS[op] = maker
        return maker

    return register


# In one call each, in place where the result is nobody else's.
_ACTIVATIONS: dict[str, Callable[[Tensor, float, bool], Tensor]] = {
    "none": lambda x, slope, own: x,
    "relu": lambda x, slope, own: F.relu(x, own),
    "relu6": lambda x, slope, own: F.relu6(x, own),
    "leaky_relu": lambda x, slope, own: F.leaky_relu(x, slope, own),
    "silu": lambda x, slope, own: F.silu(x, own),
    "hardswish": lambda x, slope, own: F.hardswish(x, own),
    "hardsigmoid": lambda x, slope, own: F.hardsigmoid(x, own),
    "sigmoid": lambda x, slope, own: x.sigmoid_() if own else x.sigmoid(),
    "gelu": lambda x, slope, own: F.gelu(x),
    "tanh": lambda x, slope, own: x.tanh_() if own else x.tanh(),
}


def _activation(step: Step, own: bool = True) -> Callable[[Tensor], Tensor]:
    activate, slope = _ACTIVATIONS[step.activation], step.slope
    return lambda x: activate(x, slope, own)


def _pair(step: Step, first: int) -> tuple[int, int]:
    return tuple(step.params[first : first + 2])


@_makes("conv")
def _conv(step: Step, weights: _Weights) -> Call:
    weight, bias = weights.of_convolution(step)
    before = weights.of_affine(step.before) if step.before else None
    stride, padding, dilation, groups = _pair(step, 0), _pair(step, 2), _pair(step, 4), step.params[6]
    options = dict(activation=step.activation, negative_slope=step.slope)
    activate, linear = _activation(step), step.weight.get().dim() == 2
    pointwise = tuple(weight.shape[2:]) == (1, 1) and padding == (0, 0) and groups == 1

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if before is not None:
            x = torch.addcmul(before[1], x, before[0]).relu_()
        vectors = linear or (pointwise and x.shape[2] == x.shape[3] == 1)
        if not vectors or on_triton("auto", x, weight, bias, residual):
            y = ops.conv2d(x, weight, bias, stride, padding, dilation, groups, residual=residual, **options)
            return as_channels_last(y)
        # A product of matrices for torch's library of those.
        y = F.linear(as_channels_last(x).permute(0, 2, 3, 1), weight[:, :, 0, 0], bias).permute(0, 3, 1, 2)
        return activate(y if residual is None else y.add_(residual))

    return run


@_makes("conv_transpose")
def _conv_transpose(step: Step, weights: _Weights) -> Call:
    weight, bias = weights.of_convolution(step)
    stride, padding, output_padding, dilation = (_pair(step, i) for i in (0, 2, 4, 6))
    options = dict(dilation=dilation, activation=step.activation, negative_slope=step.slope)

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = ops.conv_transpose2d(
            x, weight, bias, stride, padding, output_padding, step.params[8], residual=residual, **options
        )
        return as_channels_last(y)

    return run


@_makes("max_pool")
def _max_pool(step: Step, weights: _Weights) -> Call:
    kernel, stride, padding, dilation = (_pair(step, i) for i in (0, 2, 4, 6))
    indices, ceil_mode = bool(step.params[8]), bool(step.params[9])
    form = "compact" if kernel[0] * kernel[1] <= 255 else "int64"

    def run(x: Tensor):
        result = ops.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode, indices, indices=form)
        return result if indices else as_channels_last(result)

    return run


@_makes("slice")
def _slice(step: Step, weights: _Weights) -> Call:
    """A view; of pooling with indices, which lie behind the channels on the CPU, one of the two."""
    first, count = step.params
    return lambda x: x[:, first : first + count] if isinstance(x, Tensor) else x[int(first > 0)]


@_makes("max_unpool")
def _max_unpool(step: Step, weights: _Weights) -> Call:
    kernel, asked = _pair(step, 0), _pair(step, 2)

    def run(x: Tensor, indices: Tensor | PooledIndices, pooled: Tensor, like: Tensor | None = None) -> Tensor:
        size = tuple(pooled.shape[2:])
        given = asked if like is None else like.shape[2:]
        wanted = tuple(g or n * k for g, n, k in zip(given, x.shape[2:], kernel, strict=True))
        if wanted != size:
            raise RuntimeError(
                f"unpooling to {wanted[0]}x{wanted[1]} what was pooled from {size[0]}x{size[1]}: "
                "give its size as output_size"
            )
        return as_channels_last(ops.max_unpool2d(x, indices, kernel, output_size=size))

    return run


@_makes("avg_pool")
def _avg_pool(step: Step, weights: _Weights) -> Call:
    kernel, stride, padding = (_pair(step, i) for i in (0, 2, 4))
    include, ceil_mode = bool(step.params[8]), bool(step.params[9])
    return lambda x: as_channels_last(ops.avg_pool2d(x, kernel, stride, padding, ceil_mode, include))


@_makes("adaptive_avg_pool")
def _adaptive_avg_pool(step: Step, weights: _Weights) -> Call:
    size = tuple(n or None for n in step.params)
    return lambda x: as_channels_last(ops.adaptive_avg_pool2d(x, size))


@_makes("resize")
def _resize(step: Step, weights: _Weights) -> Call:
    bilinear, align_corners, by, *size = step.params[:5]
    factors = tuple(float(f) for f in step.params[5:])
    resize = functools.partial(
        ops.interpolate,
        mode="bilinear" if bilinear else "nearest",
        align_corners=bool(align_corners) if bilinear else None,
    )
    if by == 2:
        return lambda x: as_channels_last(resize(x, scale_factor=factors))
    return lambda x, like=None: as_channels_last(resize(x, tuple(size if like is None else like.shape[2:])))


@_makes("add")
def _add(step: Step, weights: _Weights) -> Call:
    activate = _activation(step)
    return lambda a, b: as_channels_last(activate(a + b))


@_makes("mul")
def _mul(step: Step, weights: _Weights) -> Call:
    activate = _activation(step)
    return lambda a, b: as_channels_last(activate(a * b))


@_makes("merge")
def _merge(step: Step, weights: _Weights) -> Call:
    activate = _activation(step)
    return lambda a, b: as_channels_last(activate(ops.interpolate(b, tuple(a.shape[2:])).add_(a)))


@_makes("activate")
def _activate(step: Step, weights: _Weights) -> Call:
    return _activation(step, own=False)


@_makes("affine")
def _affine(step: Step, weights: _Weights) -> Call:
    (scale, shift), activate = weights.of_affine(step.after[0]), _activation(step)
    return lambda x: as_channels_last(activate(torch.addcmul(shift, x, scale)))


@_makes("prelu")
def _prelu(step: Step, weights: _Weights) -> Call:
    (slope,) = weights.kept("prelu", [step.weight], (), lambda: [step.weight.get().flatten()])
    return lambda x: as_channels_last(F.prelu(x, slope))


@_makes("layer_norm")
def _layer_norm(step: Step, weights: _Weights) -> Call:
    refs, (eps,) = [step.weight, step.bias], step.params
    weight, bias = weights.kept("layer norm", refs, (), lambda: [None if r is None else r.get() for r in refs])

    def run(x: Tensor) -> Tensor:
        x = as_channels_last(x).permute(0, 2, 3, 1)
        return F.layer_norm(x, x.shape[3:], weight, bias, eps).permute(0, 3, 1, 2)

    return run


@_makes("cat")
def _cat(step: Step, weights: _Weights) -> Call:
    return lambda *maps: as_channels_last(torch.cat(maps, 1))


@_makes("interleave")
def _interleave(step: Step, weights: _Weights) -> Call:
    return lambda a, b: torch.stack([a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)], 4).flatten(3).permute(0, 3, 1, 2)


@_makes("flatten")
def _flatten(step: Step, weights: _Weights) -> Call:
    return lambda x: as_channels_last(x.flatten(1)[:, :, None, None])
