"""Reading the arguments of a node of a graph."""

from __future__ import annotations

from torch import fx

from ._lower import Lowering, Unsupported
from ._modules import has_hooks


def only(node: fx.Node):
    if len(node.args) != 1 or node.kwargs:
        raise Unsupported
    return node.args[0]


def arguments(node: fx.Node, names: tuple[str, ...]) -> list:
    """Positional and named ones in order, None where not given."""
    given = [*node.args, *[None] * (len(names) - len(node.args))]
    for name, value in node.kwargs.items():
        if name in names:
            given[names.index(name)] = value
        elif value not in (None, False):
            raise Unsupported
    if len(given) != len(names):
        raise Unsupported
    return given


def layer_arguments(to: Lowering, node: fx.Node, names: tuple[str, ...]) -> list:
    """The input and the named options, of a module or of a call."""
    if node.op != "call_module":
        return arguments(node, ("input", *names))
    module = to.module(node)
    if has_hooks(module):
        raise Unsupported
    return [only(node), *(getattr(module, name, None) for name in names)]


def two(value) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) == 1:
        pair *= 2
    if len(pair) != 2 or not all(type(n) is int for n in pair):
        raise Unsupported
    return pair
