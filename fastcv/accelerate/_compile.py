"""The backend ``"fastcv"`` of :func:`torch.compile`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from ._lower import Untraceable, lower
from ._steps import Ref


def backend(graph: fx.GraphModule, inputs: list) -> Callable:
    """Compile a graph of torch's functions into programs, with torch's own calls between them.

    Named ``"fastcv"``: ``torch.compile(model, backend="fastcv")``. Where gradients are enabled, tensors are not float32
    or not on the CPU, the graph runs as it is.
    """
    tensors = [node for node in graph.graph.nodes if node.op == "placeholder"]
    kept: dict[str, Tensor | None] = {}
    parameters = {
        node: Ref(kept, node.name) for node, value in zip(tensors, inputs, strict=True) if _is_parameter(node, value)
    }
    places = [(i, node.name) for i, node in enumerate(tensors) if node in parameters]
    for node in graph.graph.nodes:
        value = node.meta.get("example_value", node.meta.get("val"))
        if isinstance(value, Tensor):
            node.meta.update(shape=tuple(_number(n) for n in value.shape), dtype=value.dtype)
        else:
            leaves = torch.utils._pytree.tree_leaves(value)
            node.meta["plain"] = value is not None and not any(isinstance(leaf, Tensor) for leaf in leaves)
    on_cpu = all(not isinstance(x, Tensor) or x.device.type == "cpu" for x in inputs)
    if torch.is_grad_enabled() or not on_cpu:
        return graph.forward
    for i, name in places:
        kept[name] = inputs[i]
    try:
        lowered, programs = lower(graph, parameters)
    except Untraceable:
        return graph.forward
    if not programs:
        return graph.forward

    def run(*args):
        for i, name in places:
            kept[name] = args[i]
        return lowered(*args)

    return run


def _is_parameter(node: fx.Node, value) -> bool:
    steady = isinstance(value, torch.nn.Parameter) or "_parameters_" in node.name or "_buffers_" in node.name
    return steady and isinstance(value, Tensor)


def _number(size) -> int:
    """A size that may be free, as it was in the example."""
    return size if isinstance(size, int) else int(size.node.hint)
