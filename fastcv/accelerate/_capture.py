"""Finds the parts of a model that can be traced, and gives them a fused forward."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
from threading import RLock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _library, ops
from ..nn.conv import ConvNormAct
from ._lower import Untraceable, lower
from ._modules import has_hooks, has_work, is_norm
from ._program import Settings
from ._report import Part, Report

# Of the largest output, between a part and its captured form, on its first input.
TOLERANCE = {"default": 1e-4, "highest": 1e-4, "bfloat16": 0.1, "fast": 1e-3}
# The same where maps are half types, or float32 is rounded to TF32, as torch's convolutions do by default.
_ON_DEVICE = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 0.02}
# Where positions of maxima are used, rounding chooses among maxima that are as good as equal, and what they place is
# elsewhere: the share of elements that may be. In DeconvNet it is up to 0.001, between torch's memory formats as well.
_MOVED, _MOVED_ROUNDED = 0.01, 0.1


class _Tracer(fx.Tracer):
    """Layers and operators of fastcv's are calls, as torch's are."""

    def __init__(self):
        super().__init__(autowrap_modules=(math, ops))

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        layer = type(module).__module__.startswith("fastcv.nn.") and not isinstance(module, nn.Sequential)
        return layer or has_hooks(module) or is_norm(module) or super().is_leaf_module(module, name)

    def call_module(self, module: nn.Module, forward, args, kwargs):
        if type(module) is ConvNormAct:
            forward = functools.partial(nn.Sequential.forward, module)  # programs have their own way to fuse it
        return super().call_module(module, forward, args, kwargs)


def capture(module: nn.Module, name: str, report: Report, keep_strides: bool, settings: Settings) -> None:
    """Capture ``module`` as a whole, or else its children one by one.

    Results are channels-last inside. ``keep_strides`` has what leaves a part made contiguous where it was before, for
    code that calls ``.view()`` on it.
    """
    if not any(has_work(m) for m in module.modules()) or "forward" in module.__dict__:
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
            capture(child, f"{name}.{child_name}".lstrip("."), report, keep_strides, settings)
        return
    part = Part(name)
    report.parts.append(part)
    module.forward = _Forward(module, captured, part, report, keep_strides, settings)


def _trace(module: nn.Module) -> fx.GraphModule | str:
    """The module as a graph, or why not. Optional arguments keep their defaults."""
    if isinstance(
        module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    ):  # a graph of one call, rather than of what is inside
        holder = nn.Sequential(module)
        return fx.GraphModule(holder, _Tracer().trace(holder))
    parameters = inspect.signature(module.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return "for it takes any number of arguments"
    try:
        with _unchanged(module), torch.no_grad():
            graph = _Tracer().trace(module, concrete_args=defaults or None)
        return fx.GraphModule(module, graph)
    except Exception as error:  # whatever a model's Python may raise when it meets a stand-in for a tensor
        return f"for it cannot be traced ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"


@contextlib.contextmanager
def _unchanged(module: nn.Module):
    """Undo what a forward pass writes to modules: with stand-ins for tensors it would be stand-ins."""
    kept = [
        (space, dict(space)) for m in module.modules() for space in (m.__dict__, m._parameters, m._buffers, m._modules)
    ]
    try:
        yield
    finally:
        for space, content in kept:
            space.clear()
            space.update(content)


class _Shapes(fx.Interpreter):
    """Notes shape and dtype of every tensor in a graph as ``meta``."""

    def run_node(self, node: fx.Node):
        result = super().run_node(node)
        if isinstance(result, Tensor):
            node.meta.update(shape=tuple(result.shape), dtype=result.dtype)
        else:
            leaves = _pytree.tree_leaves(result)
            node.meta["plain"] = not any(isinstance(leaf, Tensor) for leaf in leaves)
        return result


class _StaticShapes(TorchDispatchMode):
    """Refuses what fake tensors refuse: operators whose result's shape, or a number taken from it, depends on data."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what is skipped would be imported first

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags):
            raise Untraceable(f"the result of {func} depends on data")
        return func(*args, **(kwargs or {}))


def _note_shapes(graph: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
    """Shape and dtype of every tensor in the graph for these inputs.

    Fake tensors compute nothing for it, but they bring torch's compiler with them, a second and 150 MB. Where nothing
    else did (torchvision does), the graph is run.
    """
    with torch.inference_mode(False), torch.no_grad():
        if "torch._dynamo" not in sys.modules:
            with _StaticShapes():
                _Shapes(graph).run(*(x.clone() for x in inputs))
            return
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True):
            like = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in inputs)
            _Shapes(graph).run(*like)


class _Forward:
    """Stands in a module's ``forward``: the captured part where it applies, else what the class defines.

    The part is lowered at the first call, whose shapes tell vectors from maps. The first result is compared with that
    of the module as it was: tracing cannot see decisions by type or by value. A part that differs is dropped, and the
    report says so.
    """

    def __init__(
        self,
        module: nn.Module,
        captured: fx.GraphModule,
        part: Part,
        report: Report,
        keep_strides: bool,
        settings: Settings,
    ):
        self.module, self.captured, self.part, self.report = module, captured.eval(), part, report
        self.keep_strides, self.settings = keep_strides, settings
        parameters = inspect.signature(type(module).forward).parameters.values()
        self.inputs = sum(p.default is p.empty for p in parameters) - 1  # without self; others keep their defaults
        self.uses_positions = _uses_positions(captured)
        self.checked = self.dropped = self.entered = False
        self.lock = RLock()
        self.spec: _pytree.TreeSpec | None = None

    def __getstate__(self):
        return {**self.__dict__, "lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, lock=RLock())

    def __call__(self, *args, **kwargs):
        applies = (
            not (self.dropped or kwargs or torch.is_grad_enabled() or self.module.training)
            and len(args) == self.inputs
            and all(isinstance(a, Tensor) and a.dtype == torch.float32 and _serves(a.device) for a in args)
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        )
        if not applies:
            return type(self.module).forward(self.module, *args, **kwargs)
        if not self.checked:
            with self.lock:
                if self.entered:  # a part that is one layer calls itself while its graph is looked at
                    return type(self.module).forward(self.module, *args)
                if not self.checked:
                    return self._first(args)
            return self(*args)
        return self._restored(self.captured(*args), args)

    def _restored(self, result, args):
        leaves = _pytree.tree_leaves(result)
        if self.keep_strides and all(a.is_contiguous() for a in args):
            leaves = [leaf.contiguous() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return _pytree.tree_unflatten(leaves, self.spec)  # graphs know no classes of dictionaries

    def _first(self, args):
        expected = type(self.module).forward(self.module, *args)
        self.spec = _pytree.tree_structure(expected)
        self.entered = True
        try:
            why = self._lower(args)
        finally:
            self.entered = False
        if why is None:
            result = self.captured(*args)
            leaves = (_pytree.tree_leaves(result), _pytree.tree_leaves(expected))
            device = args[0].device if args else torch.device("cpu")
            tolerance, moved = _tolerances(self.settings, device)
            if not _close(*leaves, tolerance, moved if self.uses_positions else 0.0):
                why = "for its captured form gave other results"
        if why is not None:
            self.dropped = True
            self.report.parts.remove(self.part)
            self.report.left.append((self.part.name, why))
        self.checked = True
        return expected

    def _lower(self, args) -> str | None:
        """Why not, where it cannot be."""
        if any(t.is_inference() for t in (*self.module.parameters(), *self.module.buffers())):
            return "for its weights were made in inference mode, where nobody can see whether they change"
        try:
            _note_shapes(self.captured, args)
        except Exception as error:  # an operator whose result's shape depends on data, or that has no rule for shapes
            return f"for the shapes in it cannot be followed ({type(error).__name__})"
        try:
            self.captured, programs = lower(self.captured, settings=self.settings)
        except Untraceable as error:
            return f"for {error}"
        if not any(program.convolutions for program in programs):
            return "for nothing in it that programs would make faster is known"
        self.part.add(programs, self.captured)
        return None


def _serves(device: torch.device) -> bool:
    """Whether programs run there. Under autocast on other devices than the CPU what a model does is torch's choice."""
    if device.type == "cpu":
        return _library.cpu_loaded
    return device.type == "cuda" and not torch.is_autocast_enabled(device.type)


def _tolerances(settings: Settings, device: torch.device) -> tuple[float, float]:
    """Of the first result: what numbers may differ by, and the share of elements that may be elsewhere."""
    if device.type == "cpu":
        return TOLERANCE[settings.precision], _MOVED
    if settings.dtype == torch.float32 and not _rounds_to_tf32():
        return TOLERANCE["default"], _MOVED
    return _ON_DEVICE[settings.dtype], _MOVED_ROUNDED


def _rounds_to_tf32() -> bool:
    try:
        return torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # operators were told apart in a way that these do not know
        return True


def _uses_positions(graph: fx.GraphModule) -> bool:
    """Whether there is unpooling in it, or pooling with indices."""
    for node in graph.graph.nodes:
        layer = graph.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(layer, nn.MaxUnpool2d) or getattr(layer, "return_indices", False):
            return True
        if node.target in (F.max_unpool2d, ops.max_unpool2d, F.max_pool2d_with_indices):
            return True
        if node.kwargs.get("return_indices"):
            return True
    return False


def _close(results: list, expected: list, tolerance: float, moved: float = 0.0) -> bool:
    if len(results) != len(expected):
        return False
    for a, b in zip(results, expected, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if a is not b and a != b:
                return False
        elif a.shape != b.shape or a.dtype != b.dtype or (b.numel() and not _close_tensors(a, b, tolerance, moved)):
            return False
    return True


def _close_tensors(a: Tensor, b: Tensor, tolerance: float, moved: float = 0.0) -> bool:
    """All but the share ``moved`` within ``tolerance`` of the largest number in ``b``. Piece by piece: a copy of a
    large map would set the peak of memory."""
    most = moved * b.numel()
    if not b.is_floating_point():
        return int((a != b).sum()) <= most
    axis = b.dim() - 1 if b.dim() < 3 else 2  # rows of maps
    pieces = [t.split(32, axis) if t.dim() else (t,) for t in (a, b)]
    limit = max(float(y.abs().where(y.isfinite(), 0).max()) for y in pieces[1]) * tolerance + 1e-30
    close = (torch.isclose(x, y, rtol=0, atol=limit, equal_nan=True) for x, y in zip(*pieces, strict=True))
    return sum(int((~c).sum()) for c in close) <= most
