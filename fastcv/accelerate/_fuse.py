"""Patterns in a captured graph: a convolution takes up the norm, addition and activation after it."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from ._layers import FusedConv

_MODULES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
}
_FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
}
_METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid"}
_ADDITIONS = (operator.add, operator.iadd, torch.add)


def is_norm(module: nn.Module) -> bool:
    """A norm with fixed statistics for each channel, in evaluation mode."""
    frozen = type(module).__name__ == "FrozenBatchNorm2d"
    known = frozen or (type(module) is nn.BatchNorm2d and module.running_var is not None)
    return known and not has_hooks(module)


def is_plain_conv(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.weight.dtype == torch.float32
        and not has_hooks(module)
    )


def has_hooks(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in names) or hasattr(module, "parametrizations")


def fuse(root: fx.GraphModule) -> tuple[int, int]:
    """Replace convolutions by fused layers; returns how many, and how many other layers these took up."""
    graph, modules = root.graph, dict(root.named_modules())
    order = {node: i for i, node in enumerate(graph.nodes)}
    count = taken = 0
    for node in list(graph.nodes):
        if node.op != "call_module" or not is_plain_conv(modules[node.target]) or len(node.args) != 1 or node.kwargs:
            continue
        chain, norm, residual, activation, slope = [node], None, None, "none", 0.01
        while activation == "none":
            end, user = chain[-1], _only_user(chain[-1])
            if user is None or _changed_between(node, user, order, modules):
                break
            if end is node and user.op == "call_module" and is_norm(modules[user.target]):
                norm = modules[user.target]
            elif residual is None and (other := _addend(user, end)) is not None:
                residual = other
            elif (found := _activation(user, end, modules)) is not None:
                activation, slope = found
            else:
                break
            chain.append(user)
        name = f"fused_{count}"
        modules[name] = FusedConv(modules[node.target], norm, activation, slope)
        root.add_submodule(name, modules[name])
        with graph.inserting_before(chain[-1]):
            call = graph.call_module(name, (node.args[0],) if residual is None else (node.args[0], residual))
        chain[-1].replace_all_uses_with(call)
        order[call] = order[chain[-1]]
        for dead in reversed(chain):
            graph.erase_node(dead)
        count += 1
        taken += len(chain) - 1
    root.recompile()
    return count, taken


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _addend(user: fx.Node, end: fx.Node) -> fx.Node | None:
    """The other operand, where ``user`` adds a tensor to ``end``."""
    if user.op != "call_function" or user.target not in _ADDITIONS or len(user.args) != 2 or user.kwargs:
        return None
    a, b = user.args
    other = b if a is end else a
    # The target of += must be the convolution's own result: another tensor may be looked at later.
    writes_other = user.target is operator.iadd and a is not end and len(a.users) > 1
    return other if isinstance(other, fx.Node) and other is not end and not writes_other else None


def _activation(user: fx.Node, end: fx.Node, modules) -> tuple[str, float] | None:
    if not user.args or user.args[0] is not end:
        return None
    if user.op == "call_module":
        module = modules[user.target]
        name = None if has_hooks(module) else _MODULES.get(type(module))
        return None if name is None else (name, getattr(module, "negative_slope", 0.01))
    if user.op == "call_function" and len(user.args) == 1 and set(user.kwargs) <= {"inplace"}:
        name = _FUNCTIONS.get(user.target)
    else:
        name = _METHODS.get(user.target) if user.op == "call_method" and len(user.args) == 1 else None
    return None if name is None else (name, 0.01)


def _changed_between(conv: fx.Node, end: fx.Node, order: dict[fx.Node, int], modules) -> bool:
    """Whether the convolution's input may be written to before ``end``, where the fused layer will read it."""
    source = conv.args[0]
    return any(
        user is not conv and user.args and user.args[0] is source and order[conv] < order[user] < order[end]
        and _writes(user, modules)
        for user in source.users
    )  # fmt: skip


def _writes(node: fx.Node, modules) -> bool:
    if node.op == "call_method":
        return node.target.endswith("_")
    if node.op == "call_module":
        return bool(getattr(modules[node.target], "inplace", False))
    return node.target in (operator.iadd, torch.relu_) or bool(node.kwargs.get("inplace"))
