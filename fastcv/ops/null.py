"""The smallest operator, a template for new ones: schema, function, fake kernel, derivatives.

Its other files: ``csrc/null/``, ``fastcv/reference/null.py``, ``fastcv/triton_kernels/null.py``,
``tests/ops/test_null.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define
from ._autograd import register_autograd
from ._checks import check_floating

define("null(Tensor x) -> Tensor", reference.null.null, triton=True)


def null(x: Tensor) -> Tensor:
    """A contiguous copy of a tensor, made by a kernel of fastcv.

    Args:
        x: any shape, float32, float64, float16 or bfloat16.

    Returns:
        The values of ``x``, contiguous.

    Raises:
        TypeError: ``x`` is not a floating tensor.

    Example:
        >>> import torch, fastcv
        >>> fastcv.ops.null(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    check_floating("x", x)
    return torch.ops.fastcv.null(x)


@torch.library.register_fake("fastcv::null", lib=LIBRARY)
def _(x):
    check_floating("x", x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    pass


def _backward(ctx, grad):
    return grad


def _jvp(ctx, tangent):
    return torch.ops.fastcv.null(tangent)


register_autograd("null", setup_context=_setup_context, backward=_backward, jvp=_jvp)


@torch.library.register_vmap("fastcv::null", lib=LIBRARY)
def _(info, in_dims, x):
    return torch.ops.fastcv.null(x), in_dims[0]
