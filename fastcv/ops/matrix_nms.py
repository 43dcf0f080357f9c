"""Matrix NMS: lower the scores of overlapping boxes, all at once."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define
from ._checks import (
    check_floating,
    check_one_of,
    check_same_device,
    check_shape,
    check_threshold,
    class_ids,
)

define(
    "matrix_nms(Tensor boxes, Tensor scores, Tensor? idxs, float sigma, bool linear) -> Tensor",
    reference.matrix_nms.matrix_nms,
    triton=True,
)


def matrix_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    idxs: Tensor | None = None,
    kernel: Literal["gaussian", "linear"] = "gaussian",
    sigma: float = 2.0,
) -> Tensor:
    """Matrix NMS: the score of each box, lowered by its overlaps with boxes of higher score.

    Wang et al., "SOLOv2: Dynamic and Fast Instance Segmentation", NeurIPS 2020, section 3.4, with
    the IoU of boxes in place of masks. Box ``j`` is lowered by the better box ``i`` that lowers it
    most, where an overlap counts the less the more ``i`` is itself overlapped (and so likely to
    go)::

        scores[j] * min over better i of f(IoU(i, j)) / f(max over better k of IoU(k, i)),   at most
        scores[j]

    with ``f(o) = exp(-sigma o^2)`` for ``kernel="gaussian"`` and ``f(o) = 1 - o`` for ``"linear"``.
    A box ``i`` for which the divisor is 0 (a copy of a better box) lowers no other. Nothing is
    dropped and the output has the shape of ``scores``, so that a detector that ends with it
    compiles, exports and vmaps; to select, see the example.

    Args:
        boxes: ``[N, 4]`` or ``[B, N, 4]`` (B images) as ``(x1, y1, x2, y2)``, any floating type.
        scores: ``[N]`` or ``[B, N]``, any floating type, at least 0.
        idxs: ``[N]`` or ``[B, N]``, the class id of each box (any integer type, or a floating type
            whose values are compared exactly): boxes lower the scores of their own class only.
            None: all are of one class.
        kernel: ``"gaussian"`` or ``"linear"``.
        sigma: of the gaussian kernel, greater than 0; the greater, the more a score is lowered.

    Returns:
        ``[N]`` or ``[B, N]`` of the type of ``scores``: the lowered scores in the order of the
        boxes. **Not differentiable**: gradients do not flow to ``boxes`` or ``scores``.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, device or range.

    Among equal scores the lowest index is the better. A box or score with NaN gets 0 and lowers no
    other. Boxes of no area, inverted and infinite boxes overlap nothing. float16 and bfloat16 are
    computed in float32. Memory: O(N).

    Example:
        >>> import torch, fastcv
        >>> boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 5.], [20., 20., 30., 30.]])
        >>> lowered = fastcv.ops.matrix_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), kernel="linear")
        >>> lowered
        tensor([0.9000, 0.4000, 0.7000])
        >>> best = lowered.topk(2).indices  # the 2 best detections
        >>> best[lowered[best] > 0.5]  # and of these the good ones
        tensor([0, 2])
    """
    check_floating("boxes", boxes)
    check_floating("scores", scores)
    batched = boxes.dim() == 3
    check_shape("boxes", boxes, ("B", "N", 4) if batched else ("N", 4))
    check_shape("scores", scores, tuple(boxes.shape[:-1]))
    check_same_device("scores", scores, "boxes", boxes)
    check_threshold("sigma", sigma)
    check_one_of("kernel", kernel, ("gaussian", "linear"))
    if not sigma > 0:
        raise ValueError(f"sigma: expected a number greater than 0, got {sigma}")
    ids = None if idxs is None else class_ids(idxs, tuple(scores.shape), boxes)
    boxes, scores = boxes.detach(), scores.detach()
    linear = kernel == "linear"
    if batched:
        return torch.ops.fastcv.matrix_nms(boxes, scores, ids, sigma, linear)
    ids = None if ids is None else ids[None]
    return torch.ops.fastcv.matrix_nms(boxes[None], scores[None], ids, sigma, linear)[0]


@torch.library.register_fake("fastcv::matrix_nms", lib=LIBRARY)
def _(boxes, scores, idxs, sigma, linear):
    return scores.new_empty(scores.shape)


def _vmap(info, in_dims, boxes, scores, idxs, sigma, linear):
    """The mapped dimension joins the images: one call for all."""

    def fold(value, dim):
        if value is None:
            return None
        value = value.movedim(dim, 0) if dim is not None else value.expand(info.batch_size, *value.shape)
        return value.flatten(0, 1)

    boxes, scores, idxs = map(fold, (boxes, scores, idxs), in_dims[:3])
    lowered = torch.ops.fastcv.matrix_nms(boxes, scores, idxs, sigma, linear)
    images = lowered.shape[0] // info.batch_size
    return lowered.view(info.batch_size, images, lowered.shape[1]), 0


torch.library.register_vmap("fastcv::matrix_nms", _vmap, lib=LIBRARY)
