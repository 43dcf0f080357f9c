"""What a part of a model computes, as a list of steps: what :mod:`_lower` writes, :mod:`_passes` shortens, and
:mod:`_program` hands to ``csrc/program``, or :mod:`_device` makes calls of."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

# In the order of Op in csrc/program/program.h.
OPS = (
    "conv", "max_pool", "avg_pool", "adaptive_avg_pool", "add", "mul", "activate", "affine", "cat", "interleave",
    "slice", "flatten", "resize", "layer_norm", "prelu", "conv_transpose", "max_unpool", "merge",
)  # fmt: skip
CONVOLUTIONS = ("conv", "conv_transpose")  # steps that take up norms, additions and activations
# In the order of Activation in csrc/conv2d/conv2d.h.
ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu", "silu", "hardswish", "hardsigmoid", "sigmoid", "gelu", "tanh")


@dataclasses.dataclass(frozen=True, eq=False)
class Ref:
    """A parameter or buffer where its module keeps it, so that another one in its place is seen."""

    owner: dict[str, Tensor | None]
    name: str

    def get(self) -> Tensor | None:
        return self.owner[self.name]

    @property
    def key(self) -> tuple[int, str]:
        return id(self.owner), self.name


def ref(module: nn.Module, name: str) -> Ref:
    return Ref(module._parameters if name in module._parameters else module._buffers, name)


def all_refs(model: nn.Module) -> list[Ref]:
    """Each parameter and buffer of a model."""
    owners = [owner for module in model.modules() for owner in (module._parameters, module._buffers)]
    return [Ref(owner, name) for owner in owners for name in owner]


class Affine:
    """``x * scale + shift`` for each channel: a norm with fixed statistics, or a parameter that scales channels."""

    def __init__(self, module: nn.Module | None = None, refs: list[Ref | None] | None = None, eps: float = 0.0):
        """A norm's module, its ``refs`` (weight, bias, mean, variance), or those of one scale."""
        names = ("weight", "bias", "running_mean", "running_var")
        self.eps = eps if module is None else module.eps
        self.parts = refs if module is None else [ref(module, name) for name in names]

    @property
    def refs(self) -> list[Ref]:
        return [part for part in self.parts if part is not None]

    def values(self) -> tuple[Tensor, Tensor]:
        """In float64."""
        if len(self.parts) == 1:
            scale = self.parts[0].get().detach().double().flatten()
            return scale, torch.zeros_like(scale)
        tensors = (None if part is None else part.get() for part in self.parts)
        gamma, beta, mean, variance = (None if t is None else t.detach().double() for t in tensors)
        scale = (variance + self.eps).rsqrt()
        scale = scale if gamma is None else scale * gamma
        return scale, (0 if beta is None else beta) - mean * scale


@dataclasses.dataclass(eq=False)
class Step:
    op: str
    inputs: list[int]
    output: int
    params: list[int | float] = dataclasses.field(default_factory=list)
    activation: str = "none"
    slope: float = 0.01
    channels: int = 0  # of prelu
    # Of conv, conv_transpose, affine, layer_norm and prelu.
    weight: Ref | None = None
    bias: Ref | None = None
    before: Affine | None = None  # of conv: relu(before(x)) is its input
    after: list[Affine] = dataclasses.field(default_factory=list)  # of convolutions and affine

    def refs(self) -> list[Ref]:
        affines = [*self.after, *([self.before] if self.before else [])]
        return [r for r in (self.weight, self.bias, *(r for a in affines for r in a.refs)) if r is not None]

    def folded(self) -> tuple[Tensor | None, Tensor | None]:
        """Of convolutions: what the norms after them scale each output by, and bias and norms add, in float64."""
        scale = None
        shift = None if self.bias is None or self.bias.get() is None else self.bias.get().detach().double()
        for affine in self.after:
            s, t = affine.values()
            scale = s if scale is None else scale * s
            shift = t if shift is None else shift * s + t
        return scale, shift

    def tensors(self) -> list[tuple[tuple, Tensor] | None]:
        """Weights as csrc/program has them, each with what tells it from others."""
        named = lambda *names: tuple(r.key for r in names if r is not None)  # noqa: E731
        as_float = lambda t: t.float().contiguous()  # noqa: E731
        if self.op == "layer_norm":
            return [
                None if r is None or r.get() is None else (named(r), r.get().detach()) for r in (self.weight, self.bias)
            ]
        if self.op == "prelu":
            slope = self.weight.get().detach()
            return [(("prelu", *named(self.weight), self.channels), slope.expand(self.channels).contiguous())]
        if self.op == "affine":
            scale, shift = self.after[0].values()
            key = named(*self.after[0].refs)
            return [(("scale", *key), as_float(scale)), (("shift", *key), as_float(shift))]
        if self.op not in CONVOLUTIONS:
            return []
        refs = named(self.bias, *(r for a in self.after for r in a.refs))
        scale, bias = self.folded()
        tensors = [
            (named(self.weight), self.weight.get().detach()),
            None if bias is None else (("bias", *refs), as_float(bias)),
            None if scale is None else (("scale", *refs), as_float(scale)),
        ]
        if self.op == "conv_transpose":
            return tensors
        before = self.before.values() if self.before else None
        before_key = named(*self.before.refs) if self.before else ()
        return [
            *tensors,
            None if before is None else (("before scale", *before_key), as_float(before[0])),
            None if before is None else (("before shift", *before_key), as_float(before[1])),
        ]


@dataclasses.dataclass
class Listing:
    """Steps over numbered values; the first values are the inputs. Ranks: 4 is ``[N, C, H, W]``, 2 is ``[N, C]``, -4 is
    ``[N, H, W, C]``."""

    inputs: list[int] = dataclasses.field(default_factory=list)  # ranks
    values: int = 0
    steps: list[Step] = dataclasses.field(default_factory=list)
    outputs: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # value and rank
    layers: int = 0  # that were lowered
