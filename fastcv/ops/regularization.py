"""Noise that regularizes training: stochastic depth and DropBlock."""

from __future__ import annotations

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_floating

__all__ = [
    "DropBlock2d",
    "DropBlock3d",
    "StochasticDepth",
    "drop_block2d",
    "drop_block3d",
    "stochastic_depth",
]


def stochastic_depth(input: Tensor, p: float, mode: str, training: bool = True) -> Tensor:
    """Zero a residual branch at random and divide what survives by ``1 - p``.

    Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016, section 3, with the scaling
    moved from inference to training.

    Args:
        input: ``[N, ...]``, any floating type.
        p: probability of zeroing, in [0, 1].
        mode: "row" draws for every example, "batch" once for all.
        training: otherwise ``input`` is returned.

    Returns:
        The shape and type of ``input``; ``input`` itself where ``p`` is 0.

    Raises:
        TypeError: ``input`` is not a floating tensor.
        ValueError: ``p`` or ``mode`` is out of range, or "row" is asked of a tensor without rows.

    Example:
        >>> import torch, fastcv
        >>> branch = torch.ones(1000, 8)
        >>> kept = fastcv.ops.stochastic_depth(branch, 0.5, "row")
        >>> sorted({tuple(row) for row in kept[:, :2].tolist()})
        [(0.0, 0.0), (2.0, 2.0)]
    """
    check_floating("input", input)
    _check_probability(p)
    if mode not in ("row", "batch"):
        raise ValueError(f"mode: expected 'row' or 'batch', got {mode!r}")
    if mode == "row" and input.dim() == 0:
        raise ValueError("input: expected at least 1 dimension with mode='row', got a scalar")
    if not training or p == 0:
        return input
    keep = 1 - p
    shape = [1] * input.dim()
    if mode == "row":
        shape[0] = input.shape[0]
    noise = input.new_empty(shape).bernoulli_(keep)
    return input * (noise / keep if keep > 0 else noise)


def drop_block2d(
    input: Tensor,
    p: float,
    block_size: int,
    inplace: bool = False,
    eps: float = 1e-6,
    training: bool = True,
) -> Tensor:
    """Zero random square blocks of each channel and rescale the rest to keep the mean.

    Ghiasi et al., "DropBlock", NeurIPS 2018, algorithm 1: a block starts at a position with
    probability ``gamma`` (equation 1), and only where it fits into the feature map. Unlike in
    ``torchvision`` the block size may be even, and the rescaling holds for large float16 maps.

    Args:
        input: ``[N, C, H, W]``, any floating type.
        p: fraction to be zeroed, about, in [0, 1].
        block_size: side of the blocks, at least 1, cut to the smaller side of the map.
        inplace: write the result into ``input``.
        eps: added to the number of kept elements.
        training: otherwise ``input`` is returned.

    Returns:
        The shape and type of ``input``; ``input`` itself where ``p`` is 0 or ``inplace`` is set.

    Raises:
        TypeError: ``input`` is not a floating tensor, or ``block_size`` not an int.
        ValueError: ``p`` or ``block_size`` is out of range, or ``input`` has another rank.

    Example:
        >>> import torch, fastcv
        >>> dropped = fastcv.ops.drop_block2d(torch.ones(8, 4, 16, 16), p=0.2, block_size=3)
        >>> bool((dropped == 0).any()), round(dropped.mean().item(), 3)
        (True, 1.0)
    """
    return _drop_block(input, p, block_size, inplace, eps, training, spatial=2)


def drop_block3d(
    input: Tensor,
    p: float,
    block_size: int,
    inplace: bool = False,
    eps: float = 1e-6,
    training: bool = True,
) -> Tensor:
    """Zero random cubes of each channel: :func:`drop_block2d` for volumes.

    Args:
        input: ``[N, C, D, H, W]``, any floating type.
        p: fraction to be zeroed, about, in [0, 1].
        block_size: side of the cubes, at least 1, cut to the smallest side of the volume.
        inplace: write the result into ``input``.
        eps: added to the number of kept elements.
        training: otherwise ``input`` is returned.

    Returns:
        The shape and type of ``input``; ``input`` itself where ``p`` is 0 or ``inplace`` is set.

    Raises:
        TypeError: ``input`` is not a floating tensor, or ``block_size`` not an int.
        ValueError: ``p`` or ``block_size`` is out of range, or ``input`` has another rank.

    Example:
        >>> import torch, fastcv
        >>> dropped = fastcv.ops.drop_block3d(torch.ones(8, 4, 8, 16, 16), p=0.2, block_size=3)
        >>> bool((dropped == 0).any()), round(dropped.mean().item(), 3)
        (True, 1.0)
    """
    return _drop_block(input, p, block_size, inplace, eps, training, spatial=3)


def _drop_block(
    input: Tensor,
    p: float,
    block_size: int,
    inplace: bool,
    eps: float,
    training: bool,
    spatial: int,
) -> Tensor:
    check_floating("input", input)
    _check_probability(p)
    if input.dim() != spatial + 2:
        expected = "[N, C, H, W]" if spatial == 2 else "[N, C, D, H, W]"
        raise ValueError(f"input: expected shape {expected}, got {list(input.shape)}")
    if not isinstance(block_size, (int, torch.SymInt)):
        raise TypeError(f"block_size: expected an int, got {block_size!r}")
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    if not training or p == 0 or input.numel() == 0:
        return input

    keep = _blocks_to_keep(input, p, block_size, spatial)
    kept = keep.sum(dtype=torch.promote_types(input.dtype, torch.float32))
    scale = keep.numel() / (kept + eps)
    if inplace:
        return input.mul_(keep).mul_(scale)
    return input * keep * scale


def _blocks_to_keep(input: Tensor, p: float, block_size: int, spatial: int) -> Tensor:
    """0 within the blocks, 1 elsewhere, in the shape of ``input``."""
    sizes = input.shape[2:]
    block_size = min(block_size, *sizes)
    gamma = p / block_size**spatial
    for size in sizes:
        gamma *= size / (size - block_size + 1)
    starts = [size - block_size + 1 for size in sizes]
    noise = input.new_empty((*input.shape[:2], *starts)).bernoulli_(gamma)
    # A position is dropped when one of the block_size positions up to it starts a block.
    noise = F.pad(noise, [block_size - 1] * (2 * spatial))
    pool = F.max_pool2d if spatial == 2 else F.max_pool3d
    return 1 - pool(noise, block_size, stride=1)


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a probability in [0, 1], got {p!r}")


class StochasticDepth(nn.Module):
    """:func:`stochastic_depth` as a layer, active in training mode.

    Args:
        p: probability of zeroing, in [0, 1].
        mode: "row" or "batch".

    Example:
        >>> import torch, fastcv
        >>> fastcv.ops.StochasticDepth(0.2, "row").eval()(torch.ones(2))
        tensor([1., 1.])
    """

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p = p
        self.mode = mode

    def forward(self, input: Tensor) -> Tensor:
        return stochastic_depth(input, self.p, self.mode, self.training)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}(p={self.p}, mode={self.mode})"


class DropBlock2d(nn.Module):
    """:func:`drop_block2d` as a layer, active in training mode.

    Args:
        p: fraction to be zeroed, about, in [0, 1].
        block_size: side of the blocks.
        inplace: write the result into the input.
        eps: added to the number of kept elements.

    Example:
        >>> import torch, fastcv
        >>> fastcv.ops.DropBlock2d(0.2, 3).eval()(torch.ones(1, 1, 1, 2))
        tensor([[[[1., 1.]]]])
    """

    def __init__(self, p: float, block_size: int, inplace: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.p = p
        self.block_size = block_size
        self.inplace = inplace
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        return drop_block2d(input, self.p, self.block_size, self.inplace, self.eps, self.training)

    def __repr__(self) -> str:
        name = self.__class__.__name__
        return f"{name}(p={self.p}, block_size={self.block_size}, inplace={self.inplace})"


class DropBlock3d(DropBlock2d):
    """:func:`drop_block3d` as a layer, active in training mode; arguments as :class:`DropBlock2d`.

    Example:
        >>> import torch, fastcv
        >>> fastcv.ops.DropBlock3d(0.2, 3).eval()(torch.ones(1, 1, 1, 1, 2))
        tensor([[[[[1., 1.]]]]])
    """

    def forward(self, input: Tensor) -> Tensor:
        return drop_block3d(input, self.p, self.block_size, self.inplace, self.eps, self.training)


# torch.fx must record these calls instead of following branches that depend on values.
torch.fx.wrap("stochastic_depth")
torch.fx.wrap("drop_block2d")
torch.fx.wrap("drop_block3d")
