"""From a traced graph to programs: runs of nodes that csrc/program computes, and torch's calls between them.

Values are followed with the shapes of an example, for what shapes decide (what is a vector, what is broadcast); sizes
of images stay free. Nodes that only compute sizes are copied to the new graph when a call of torch's needs them.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable

import torch
from torch import fx, nn

from ._modules import has_hooks, kind
from ._program import DEFAULT, Program, Settings
from ._steps import CONVOLUTIONS, Listing, Ref, Step


class Unsupported(Exception):
    """A node that stays with torch."""


class Untraceable(Exception):
    """Something for which the whole part must stay as it is."""


class IndicesNeeded(Exception):
    """Indices of max pooling leave their program, where they are bytes."""


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of a program: as ``[N, C, H, W]`` (rank 4), ``[N, C]`` (2) or ``[N, H, W, C]`` (-4)."""

    id: int
    rank: int


@dataclasses.dataclass(frozen=True)
class Parameter:
    ref: Ref


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Channels split in two axes (a view of five dimensions), perhaps exchanged."""

    value: Value
    groups: int
    exchanged: bool = False


@dataclasses.dataclass(frozen=True)
class Indices:
    """Of max pooling with windows of ``kernel``, which are side by side, over ``pooled``."""

    value: Value
    pooled: Value
    kernel: tuple[int, int]
    compact: bool  # fastcv's, which know the size of what was pooled


class Segment:
    """A run of nodes that become one program."""

    def __init__(self):
        self.listing = Listing()
        self.sources: list[fx.Node] = []  # of the inputs, in the old graph
        self.nodes: dict[fx.Node, Held] = {}

    def input(self, node: fx.Node) -> Value:
        if node not in self.nodes:
            shape, dtype = node.meta.get("shape"), node.meta.get("dtype")
            if shape is None or dtype != torch.float32 or len(shape) not in (2, 4):
                raise Unsupported
            if self.listing.steps and self.listing.inputs and self.sources and self.listing.values != len(self.sources):
                self._shift()
            self.nodes[node] = Value(len(self.sources), len(shape))
            self.sources.append(node)
            self.listing.inputs.append(len(shape))
            self.listing.values += 1
        return self.nodes[node]

    def _shift(self) -> None:
        """Make room for another input: they are numbered first."""
        first = len(self.sources)

        def moved(i: int) -> int:
            return i + (i >= first)

        for step in self.listing.steps:
            step.inputs, step.output = [moved(i) for i in step.inputs], moved(step.output)

        def move(held):
            if isinstance(held, tuple):
                return tuple(move(v) for v in held)
            if isinstance(held, Grouped):
                return dataclasses.replace(held, value=move(held.value))
            if isinstance(held, Indices):
                return dataclasses.replace(held, value=move(held.value), pooled=move(held.pooled))
            return Value(moved(held.id), held.rank)

        self.nodes = {node: move(held) for node, held in self.nodes.items()}

    def step(self, op: str, inputs: list[Value], rank: int, params=(), **rest) -> Value:
        output = Value(self.listing.values, rank)
        self.listing.values += 1
        self.listing.steps.append(Step(op, [v.id for v in inputs], output.id, list(params), **rest))
        return output


Held = Value | tuple[Value | Indices, ...] | Grouped | Indices  # what stands for a node in a program
Handler = Callable[["Lowering", fx.Node], Held]
CALLS: dict[object, Handler] = {}  # by function, name of a method, or type of a module
# Calls that programs do not have, to fastcv's operators, each with the names of its options.
OPERATORS: dict[object, tuple[Callable, tuple[str, ...]]] = {}


def handles(*targets) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        CALLS.update(dict.fromkeys(targets, handler))
        return handler

    return register


class Lowering:
    """One graph on its way."""

    def __init__(
        self, root: fx.GraphModule, parameters: dict[fx.Node, Ref], settings: Settings, with_indices: bool = True
    ):
        self.root, self.modules = root, dict(root.named_modules())
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}  # from old nodes to new ones
        self.segment = Segment()
        self.programs: list[Program] = []
        self.parameters, self.settings, self.with_indices = parameters, settings, with_indices

    # ---- for handlers

    def value(self, argument) -> Value:
        """The value of a node as an operand."""
        if not isinstance(argument, fx.Node):
            raise Unsupported
        held = self.segment.nodes.get(argument)
        if held is None:
            if isinstance(self.parameter(argument), Parameter):
                raise Unsupported
            held = self.segment.input(argument)
        if not isinstance(held, Value):
            raise Unsupported
        return held

    def map(self, argument) -> Value:
        value = self.value(argument)
        if value.rank != 4:
            raise Unsupported
        return value

    def parameter(self, argument) -> Parameter | None:
        if not isinstance(argument, fx.Node):
            return None
        if argument in self.parameters:
            return Parameter(self.parameters[argument])
        if argument.op != "get_attr":
            return None
        path, _, name = argument.target.rpartition(".")
        module = self.root.get_submodule(path)
        for owner in (module._parameters, module._buffers):
            if name in owner:
                return Parameter(Ref(owner, name))
        return None

    def module(self, node: fx.Node) -> nn.Module:
        return self.modules[node.target]

    def step(self, *args, **kwargs) -> Value:
        return self.segment.step(*args, **kwargs)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        shape = node.meta.get("shape")
        if shape is None:
            raise Unsupported
        return shape

    # ---- the walk

    def run(self) -> fx.GraphModule:
        for node in self.root.graph.nodes:
            if node.op == "output":
                self.close()
                self.emit(node)
            elif node.op == "placeholder":
                self.emit(node)
            elif self.is_lazy(node):
                if node.is_impure():  # an assertion: nobody asks for its result
                    self.close()
                    self.emit(node)
            elif not self.lower(node):
                self.close()
                self.emit_call(node)
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph)

    def is_lazy(self, node: fx.Node) -> bool:
        return node.op == "get_attr" or ("shape" not in node.meta and node.meta.get("plain", False))

    def lower(self, node: fx.Node) -> bool:
        target = node.target
        if node.op == "call_module":
            target = kind(self.module(node)) if node.target in self.modules else None
        handler = CALLS.get(target)
        floats = node.meta.get("dtype") in (torch.float32, None) or target is operator.getitem
        if handler is None or not floats:
            return False
        mark = len(self.segment.listing.steps), self.segment.listing.values
        try:
            result = handler(self, node)
            if self.writes(node):
                self.rebind(node.args[0], result)
        except Unsupported:
            assert (len(self.segment.listing.steps), self.segment.listing.values) >= mark
            del self.segment.listing.steps[mark[0] :]
            return False
        self.segment.nodes[node] = result
        self.segment.listing.layers += 1
        return True

    def writes(self, node: fx.Node) -> bool:
        """Whether it changes its first argument."""
        if node.op == "call_module":
            module = self.module(node)
            return bool(getattr(module, "inplace", False)) and not isinstance(module, nn.modules.dropout._DropoutNd)
        if node.op == "call_method":
            return node.target.endswith("_")
        return node.target in (operator.iadd, operator.imul, torch.relu_) or (
            bool(node.kwargs.get("inplace")) and node.target not in _DROPOUTS
        )

    def rebind(self, node: fx.Node, result: Value) -> None:
        """Later readers of a value that was written to in place see what it became."""
        held = self.segment.nodes[node]
        if node in self.segment.sources:
            raise Unsupported  # what the caller gave must change too
        others = [n for n, v in self.segment.nodes.items() if n is not node and v == held]
        views = any(
            s.op in ("slice", "flatten") and held.id in (s.output, *s.inputs) for s in self.segment.listing.steps
        )
        if views or any(self.is_read_later(n, node) for n in others):
            raise Untraceable("it writes into views")
        self.segment.nodes[node] = result

    def is_read_later(self, node: fx.Node, after: fx.Node) -> bool:
        order = self.order
        return any(order[user] > order[after] for user in node.users)

    @property
    def order(self) -> dict[fx.Node, int]:
        if not hasattr(self, "_order"):
            self._order = {node: i for i, node in enumerate(self.root.graph.nodes)}
        return self._order

    # ---- the new graph

    def emit(self, node: fx.Node) -> fx.Node:
        if node not in self.env:
            for argument in node.all_input_nodes:
                self.emit(argument)
            self.env[node] = self.graph.node_copy(node, lambda n: self.env[n])
        return self.env[node]

    def emit_call(self, node: fx.Node) -> None:
        """A call that programs do not have: of fastcv's operator where there is one, or as it was."""
        module = self.modules.get(node.target) if node.op == "call_module" else None
        operator, names = OPERATORS.get(node.target if module is None else kind(module), (None, ()))
        if operator is None or (module is not None and has_hooks(module)):
            self.emit(node)
            return
        for argument in node.all_input_nodes:
            self.emit(argument)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        options = () if module is None else tuple(getattr(module, name) for name in names)
        self.env[node] = self.graph.call_function(operator, (*args, *options), kwargs)

    def close(self) -> None:
        """End the segment: its program, and nodes for what is read outside."""
        segment, self.segment = self.segment, Segment()
        exported = [n for n in segment.nodes if n not in segment.sources and self.needed_outside(n, segment)]
        if any(isinstance(segment.nodes[n], Indices) or _has_indices(segment.nodes[n]) for n in exported):
            raise IndicesNeeded
        if any(not isinstance(segment.nodes[n], Value) for n in exported):
            raise Untraceable("it hands on pieces that are not tensors")
        if not any(step.op in CONVOLUTIONS for step in segment.listing.steps):  # torch is as fast with what remains
            for node in segment.nodes:
                if node not in segment.sources:
                    self.emit(node)
            return
        if not exported:
            return
        outputs = list(dict.fromkeys((segment.nodes[n].id, segment.nodes[n].rank) for n in exported))
        segment.listing.outputs = outputs
        program = Program(segment.listing, self.settings)
        name = f"program_{len(self.programs)}"
        self.programs.append(program)
        self.root.add_submodule(name, program)
        call = self.graph.call_module(name, tuple(self.emit(n) for n in segment.sources))
        results = [self.graph.call_function(operator.getitem, (call, i)) for i in range(len(outputs))]
        for node in exported:
            self.env[node] = results[outputs.index((segment.nodes[node].id, segment.nodes[node].rank))]

    def needed_outside(self, node: fx.Node, segment: Segment) -> bool:
        for user in node.users:
            if user in segment.nodes and user not in segment.sources:
                continue
            if self.is_lazy(user) and not self.needed_outside(user, segment):
                continue
            return True
        return False


def _has_indices(held: Held) -> bool:
    return isinstance(held, tuple) and any(isinstance(piece, Indices) for piece in held)


_DROPOUTS = (torch.nn.functional.dropout, torch.nn.functional.dropout2d)


def lower(
    root: fx.GraphModule, parameters: dict[fx.Node, Ref] | None = None, settings: Settings = DEFAULT
) -> tuple[fx.GraphModule, list[Program]]:
    """A graph of programs and what lies between them. Nodes must have ``meta["shape"]``; ``parameters`` are the
    placeholders that stand for some.

    Raises:
        Untraceable: the part must stay as it is.
    """
    from . import _handlers  # which needs this module

    _handlers.add_torchvision()
    for with_indices in (True, False):  # of max pooling, unless they are wanted outside of their programs
        lowering = Lowering(root, parameters or {}, settings, with_indices)
        try:
            return lowering.run(), lowering.programs
        except IndicesNeeded:
            continue
    raise AssertionError("without indices in programs nobody needs them")
