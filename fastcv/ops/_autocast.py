"""Operators with weights under ``torch.autocast``: results of its type, as torch's convolutions have them.

The CPU's kernels compute in float32 whatever comes in, and only the result is rounded: more exact than torch, and no
slower where the processor has no instructions for the half type. On other devices torch's operators compute in the half
type. As in torch, float64 is left alone, and so is what has the half type already.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Whether there is anything to do: the one test that every call pays for.
any_enabled = torch._C._is_any_autocast_enabled


def autocast(operator: Callable[..., Tensor], tensors: dict[str, Tensor | None], **options) -> Tensor | None:
    """``operator(**tensors, **options)`` as autocast has it; None where autocast changes nothing."""
    given = [t for t in tensors.values() if isinstance(t, Tensor)]
    if not given or not torch.is_autocast_enabled(given[0].device.type):
        return None
    device = given[0].device.type
    half, types = torch.get_autocast_dtype(device), {t.dtype for t in given}
    if types == {half} or not types <= {torch.float32, torch.float16, torch.bfloat16}:
        return None
    computed = torch.float32 if device == "cpu" else half
    with torch.autocast(device, enabled=False):
        cast = {name: t.to(computed) if isinstance(t, Tensor) else t for name, t in tensors.items()}
        return operator(**cast, **options).to(half)
