"""Finds the parts of a model that can be traced, and gives them a fused forward."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from ._fuse import fuse, has_hooks, is_norm, is_plain_conv
from ._report import Part, Report

TOLERANCE = 1e-4  # of the largest output, between a part and its captured form, on its first input


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return has_hooks(module) or is_norm(module) or super().is_leaf_module(module, name)


def capture(module: nn.Module, name: str, report: Report, root: bool = False) -> None:
    """Capture ``module`` as a whole, or else its children one by one."""
    if not any(is_plain_conv(m) for m in module.modules()) or "forward" in module.__dict__:
        return
    if has_hooks(module):
        report.left.append((name, "for it has hooks"))
        return
    captured = _trace(module)
    if isinstance(captured, str):
        children = dict(module.named_children())
        if not children:
            report.left.append((name, captured))
        for child_name, child in children.items():
            capture(child, f"{name}.{child_name}".lstrip("."), report)
        return
    convolutions, taken = fuse(captured)
    if convolutions:
        part = Part(name, convolutions, taken)
        report.parts.append(part)
        module.forward = _Forward(module, captured, part, report)


def _trace(module: nn.Module) -> fx.GraphModule | str:
    """The module as a graph, or why not. Optional arguments keep their defaults."""
    if isinstance(module, nn.Conv2d):  # a graph of one call, rather than of what is inside
        holder = nn.Sequential(module)
        return fx.GraphModule(holder, _Tracer().trace(holder))
    parameters = inspect.signature(module.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return "for it takes any number of arguments"
    try:
        with torch.no_grad():
            graph = _Tracer().trace(module, concrete_args=defaults or None)
        return fx.GraphModule(module, graph)
    except Exception as error:  # whatever a model's Python may raise when it meets a stand-in for a tensor
        return f"for it cannot be traced ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"


class _Forward:
    """Stands in a module's ``forward``: the captured part where it applies, else what the class defines.

    The first result is compared with that of the module as it was: tracing cannot see decisions by type or by value. A
    part that differs is dropped, and the report says so.
    """

    def __init__(self, module: nn.Module, captured: fx.GraphModule, part: Part, report: Report):
        self.module, self.captured, self.part, self.report = module, captured.eval(), part, report
        self.inputs = sum(node.op == "placeholder" for node in captured.graph.nodes)
        self.checked = self.dropped = False

    def __call__(self, *args, **kwargs):
        applies = (
            not (self.dropped or kwargs or torch.is_grad_enabled() or self.module.training)
            and len(args) <= self.inputs
            and all(isinstance(a, Tensor) and a.dtype == torch.float32 and a.device.type == "cpu" for a in args)
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        )
        if not applies:
            return type(self.module).forward(self.module, *args, **kwargs)
        result = self.captured(*args)
        if not self.checked:
            expected = type(self.module).forward(self.module, *args)
            self.checked = True
            if not _close(result, expected):
                self.dropped = True
                self.report.parts.remove(self.part)
                self.report.left.append((self.part.name, "for its captured form gave other results"))
                return expected
        return result


def _close(result, expected) -> bool:
    results, spec = _pytree.tree_flatten(result)
    others, other_spec = _pytree.tree_flatten(expected)
    if spec != other_spec:
        return False
    for a, b in zip(results, others, strict=True):
        if not isinstance(b, Tensor):
            if a != b:
                return False
        elif a.shape != b.shape or a.dtype != b.dtype:
            return False
        elif b.numel():
            scale = b.double().abs().max()
            if not torch.allclose(a.double(), b.double(), rtol=0, atol=float(scale) * TOLERANCE + 1e-30, equal_nan=True):
                return False
    return True
