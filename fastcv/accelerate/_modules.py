"""Which modules are what their type says."""

from __future__ import annotations

import torch
from torch import nn


def kind(module: nn.Module) -> type[nn.Module]:
    """Its type; of fastcv's layers that of the layer of torch's which they are one of."""
    if type(module).__module__.startswith("fastcv.nn."):
        return next((t for t in type(module).__mro__ if t.__module__.startswith("torch.nn.")), type(module))
    return type(module)


def has_hooks(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in names) or hasattr(module, "parametrizations")


def is_norm(module: nn.Module) -> bool:
    """A norm with fixed statistics for each channel, in evaluation mode."""
    frozen = type(module).__name__ == "FrozenBatchNorm2d"
    known = frozen or (type(module) is nn.BatchNorm2d and module.running_var is not None)
    return known and not has_hooks(module)


def is_plain_transposed(module: nn.Module) -> bool:
    return kind(module) is nn.ConvTranspose2d and module.weight.dtype == torch.float32 and not has_hooks(module)


def is_plain_conv(module: nn.Module) -> bool:
    return (
        kind(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.weight.dtype == torch.float32
        and not has_hooks(module)
    )


def has_work(module: nn.Module) -> bool:
    """Whether programs make it faster by itself."""
    return is_plain_conv(module) or is_plain_transposed(module) or kind(module) is nn.Linear
