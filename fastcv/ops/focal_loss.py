"""The focal loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_floating, check_shape, check_tensor
from ._reduction import check_reduction, reduce_loss

__all__ = ["sigmoid_focal_loss"]


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
) -> Tensor:
    """Binary cross-entropy in which examples already classified well count little.

    ``alpha_t (1 - p_t)^gamma (-log p_t)``, where ``p_t`` is the probability given to the target:
    Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 5. Both factors are
    computed without cancellation, so confident examples keep their small loss and a finite
    derivative for every ``gamma``.

    Args:
        inputs: logits, any shape, any floating type.
        targets: the same shape: 0, 1 or between; floating, integer or bool.
        alpha: weight of the positive class in [0, 1], ``1 - alpha`` for the negative one; -1 for
            no weights.
        gamma: focusing exponent, at least 0; with 0 this is the weighted cross-entropy.
        reduction: "none", "mean" or "sum". The mean of no examples is 0 (``torchvision``: NaN).

    Returns:
        The shape of ``inputs`` or a scalar, in the wider type of ``inputs`` and floating
        ``targets``; float32 under autocast.

    Raises:
        TypeError: ``inputs`` is not a floating tensor, or ``targets`` not a tensor.
        ValueError: the shapes differ, or ``alpha``, ``gamma`` or ``reduction`` is out of range.

    Example:
        >>> import torch, fastcv
        >>> logits = torch.tensor([0.0, 4.0, -4.0])
        >>> fastcv.ops.sigmoid_focal_loss(logits, torch.tensor([1, 1, 0]))
        tensor([4.3322e-02, 1.4679e-06, 4.4037e-06])
    """
    check_floating("inputs", inputs)
    check_tensor("targets", targets)
    check_shape("targets", targets, tuple(inputs.shape))
    check_reduction(reduction)
    if not (alpha == -1 or 0 <= alpha <= 1):
        raise ValueError(f"alpha: expected a number in [0, 1], or -1, got {alpha!r}")
    if not gamma >= 0:
        raise ValueError(f"gamma: expected a number of at least 0, got {gamma!r}")
    if not targets.is_floating_point():
        targets = targets.to(inputs.dtype)

    if torch.is_autocast_enabled(inputs.device.type):
        inputs, targets = inputs.float(), targets.float()

    loss = _cross_entropy(inputs, targets) * _wrongness(inputs, targets, gamma) ** gamma
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return reduce_loss(loss, reduction)


def _cross_entropy(inputs: Tensor, targets: Tensor) -> Tensor:
    """``F.binary_cross_entropy_with_logits``, which cancels to 0 for confident negatives."""
    # maximum, and not relu, because at 0 it has the derivative 1/2 that belongs there.
    ramp = torch.maximum(inputs, torch.zeros((), dtype=inputs.dtype, device=inputs.device))
    return ramp - inputs * targets + torch.log1p(torch.exp(-inputs.abs()))


def _wrongness(inputs: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """``1 - p_t``."""
    wrong = torch.sigmoid(inputs) * (1 - targets) + torch.sigmoid(-inputs) * targets
    if gamma < 1:  # the power has an infinite derivative at 0
        wrong = wrong.clamp(min=torch.finfo(wrong.dtype).tiny)
    return wrong
