"""Derivatives for operators of ``fastcv::``, registered at the dispatcher.

``torch.library.register_autograd`` knows no forward-mode rule: ``torch.func.jvp`` through such an operator silently
gives a zero tangent. So the autograd kernel is our own: one ``autograd.Function`` per operator, with ``setup_context``,
``backward`` and ``jvp``, whose forward runs the operator's kernel below autograd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import _C
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils import _pytree

from .._library import LIBRARY


def _has_tangent(args) -> bool:
    return forward_ad._current_level >= 0 and any(
        isinstance(leaf, torch.Tensor) and forward_ad.unpack_dual(leaf).tangent is not None
        for leaf in _pytree.tree_leaves(args)
    )


def needs_derivatives(*args) -> bool:
    """Whether a call with these arguments must be seen by autograd, in either mode."""
    return (torch.is_grad_enabled() and _C._any_requires_grad(*args)) or _has_tangent(args)


class _Primals:
    """The ctx of a jvp rule: what it saved comes without tangents, as the rule has these apart."""

    def __init__(self, ctx):
        self._ctx = ctx

    def __getattr__(self, name):
        return getattr(self._ctx, name)

    @property
    def saved_tensors(self):
        return tuple(None if t is None else forward_ad.unpack_dual(t).primal for t in self._ctx.saved_tensors)


@contextlib.contextmanager
def _grad_modes(backward: bool, forward: bool):
    with torch.set_grad_enabled(backward), forward_ad._set_fwd_grad_enabled(forward):
        yield


def register_autograd(name: str, *, setup_context: Callable, backward: Callable, jvp: Callable) -> None:
    """Give ``fastcv::name`` first derivatives in both modes.

    Args:
        name: the operator.
        setup_context: ``(ctx, inputs, output)``, saves what the two rules need. Use ``ctx.save_for_backward`` and
            ``ctx.save_for_forward``.
        backward: ``(ctx, *grad_outputs)`` -> one gradient (or None) per argument. Made of differentiable operators,
            so that second derivatives follow. ``ctx.needs_input_grad`` has one flag for each argument (for a list of
            tensors a list of flags).
        jvp: ``(ctx, *tangents)`` -> tangent of the output(s); tangents are None for constant arguments.
    """
    op = getattr(torch.ops.fastcv, name).default
    returns_list = str(op._schema.returns[0].type) == "List[Tensor]"
    # Lists of tensors are flattened, as autograd does not look into them. That takes longer than all the rest.
    has_lists = any(
        "List[Tensor]" in str(a.type) or "List[Optional[Tensor]]" in str(a.type) for a in op._schema.arguments
    )
    defaults = [a.default_value if a.has_default_value() else None for a in op._schema.arguments]

    def redispatch(keyset, args):
        with _C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _C._after_autograd_keyset, *args)

    # The base of autograd.Function without its handling of torch.func: inside the dispatcher the transform has peeled
    # its level off already, as for any built-in operator. But autograd.Function turns both grad modes off while forward
    # and jvp run, and the next level, that of an outer transform, needs them as they were.
    def unflatten(leaves, spec):
        return leaves if spec is None else _pytree.tree_unflatten(leaves, spec)

    class Derivative(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(call, spec, *leaves):
            keyset, *modes = call
            with _grad_modes(*modes):
                result = redispatch(keyset, unflatten(leaves, spec))
            return tuple(result) if returns_list else result

        @staticmethod
        def setup_context(ctx, inputs, output):
            (_, *ctx.modes), ctx.spec = inputs[:2]
            setup_context(ctx, unflatten(inputs[2:], ctx.spec), output)

        @staticmethod
        def backward(ctx, *grads):
            needs = ctx.needs_input_grad
            ctx.needs_input_grad = unflatten(needs[2:], ctx.spec)
            try:
                gradients = backward(ctx, list(grads)) if returns_list else backward(ctx, *grads)
            finally:
                ctx.needs_input_grad = needs
            gradients = gradients if isinstance(gradients, tuple) else (gradients,)
            if ctx.spec is not None:
                gradients = _pytree._broadcast_to_and_flatten(gradients, ctx.spec)
            return None, None, *gradients

        @staticmethod
        def jvp(ctx, call, spec, *tangents):
            with _grad_modes(*ctx.modes):
                result = jvp(_Primals(ctx), *unflatten(tangents, ctx.spec))
            return tuple(result) if returns_list else result

    Derivative.__name__ = Derivative.__qualname__ = f"fastcv_{name}"

    def autograd_kernel(keyset, *args):
        # Grad mode off and no dual level: the usual case in inference, kept to two cheap tests.
        if needs_derivatives(*args):
            leaves, spec = (*args, *defaults[len(args) :]), None
            if has_lists:
                leaves, spec = _pytree.tree_flatten(leaves)
            call = keyset, torch.is_grad_enabled(), _C._is_fwd_grad_enabled()
            if _C._are_functorch_transforms_active():
                with enable_single_level_autograd_function():
                    result = Derivative.apply(call, spec, *leaves)
            else:
                result = Derivative.apply(call, spec, *leaves)
            return list(result) if returns_list else result
        return redispatch(keyset, args)

    LIBRARY.impl(name, autograd_kernel, "Autograd", with_keyset=True)
