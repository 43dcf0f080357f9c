"""RoIAlign over a feature pyramid in one call: :func:`multiscale_roi_align` and the layer :class:`MultiScaleRoIAlign`.

Each region is pooled from one level, chosen by its size inside the kernel (Lin et al., "Feature Pyramid Networks for
Object Detection", CVPR 2017, equation 1): no loop over levels, no gathering and scattering of regions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import reference
from .._library import LIBRARY, define
from ._autograd import register_autograd
from ._checks import check_same_device, pair
from ._rois import Boxes, as_rois, check_input, check_rois, fake_pooled, fold_images, fold_rois, front

define(
    "multiscale_roi_align(Tensor[] inputs, Tensor boxes, float[] spatial_scales, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned, int canonical_scale, int canonical_level) -> Tensor",
    reference.roi_align.multiscale_roi_align,
    triton=True,
)
define(
    "multiscale_roi_align_backward(Tensor grad, Tensor boxes, float[] spatial_scales, SymInt pooled_height, "
    "SymInt pooled_width, SymInt batch_size, SymInt channels, SymInt[] heights, SymInt[] widths, int sampling_ratio, "
    "bool aligned, int canonical_scale, int canonical_level) -> Tensor[]",
    reference.roi_align.multiscale_roi_align_backward,
    triton=True,
)


def multiscale_roi_align(
    inputs: list[Tensor],
    boxes: Boxes,
    output_size: int | tuple[int, int],
    spatial_scales: list[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    canonical_scale: int = 224,
    canonical_level: int = 4,
) -> Tensor:
    """:func:`~fastcv.ops.roi_align` of each region from the level of a feature pyramid that suits its size.

    A region of area ``A`` asks for level ``k = floor(canonical_level + log2(sqrt(A) / canonical_scale))``; the map with
    ``spatial_scale == 2 ** -k`` is level k. It is pooled from the finest map that is at least as coarse, or else from
    the coarsest.

    Args:
        inputs: maps ``[N, C, H_i, W_i]``, finest first, of one dtype, contiguous or channels-last.
        boxes: ``[K, 5]`` as ``(batch index, x1, y1, x2, y2)``, or a list of one ``[L, 4]`` per image, in image pixels.
        output_size: bins, ``PH`` or ``(PH, PW)``.
        spatial_scales: of each map, such as ``[1/4, 1/8, 1/16, 1/32]``.
        sampling_ratio, aligned: as for :func:`~fastcv.ops.roi_align`.
        canonical_scale: side in pixels of the region that belongs on ``canonical_level``.
        canonical_level: that level.

    Returns:
        ``[K, C, PH, PW]`` in the maps' dtype and the first map's memory format. Differentiable with respect to the maps
        in both modes, twice.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or device.
        RuntimeError: a batch index outside 0 to N - 1.

    Example:
        >>> import torch, fastcv
        >>> pyramid = [torch.rand(1, 8, 64, 64), torch.rand(1, 8, 32, 32)]
        >>> boxes = [torch.tensor([[0., 0., 40., 30.], [10., 10., 250., 240.]])]
        >>> fastcv.ops.multiscale_roi_align(pyramid, boxes, 7, [1 / 4, 1 / 8]).shape
        torch.Size([2, 8, 7, 7])
    """
    if not isinstance(inputs, (list, tuple)) or not inputs:
        raise TypeError(f"inputs: expected a non-empty list of Tensors [N, C, H, W], got {type(inputs).__name__}")
    for i, map in enumerate(inputs):
        check_input(f"inputs[{i}]", map)
        if map.shape[:2] != inputs[0].shape[:2] or map.dtype != inputs[0].dtype:
            raise ValueError(
                f"inputs[{i}]: expected N, C and dtype of inputs[0], {tuple(inputs[0].shape[:2])} {inputs[0].dtype}, "
                f"got {tuple(map.shape[:2])} {map.dtype}"
            )
        check_same_device(f"inputs[{i}]", map, "inputs[0]", inputs[0])
    if len(spatial_scales) != len(inputs) or not all(scale > 0 for scale in spatial_scales):
        raise ValueError(f"spatial_scales: expected {len(inputs)} positive numbers, got {spatial_scales!r}")
    if canonical_scale <= 0:
        raise ValueError(f"canonical_scale: expected a positive number, got {canonical_scale!r}")
    rois = as_rois(boxes, inputs[0].shape[0])
    check_rois(inputs[0], rois)
    height, width = pair("output_size", output_size)
    return torch.ops.fastcv.multiscale_roi_align(
        list(inputs), rois, list(spatial_scales), height, width, sampling_ratio, aligned, canonical_scale,
        canonical_level,
    )  # fmt: skip


class MultiScaleRoIAlign(nn.Module):
    """:func:`multiscale_roi_align` as a layer that infers the maps' scales, with torchvision's arguments.

    Args:
        featmap_names: which entries of the dictionary of maps take part, in the dictionary's order.
        output_size: bins, ``PH`` or ``(PH, PW)``.
        sampling_ratio: as for :func:`~fastcv.ops.roi_align`.
        canonical_scale, canonical_level: as for :func:`multiscale_roi_align`.

    Shapes: ``forward(x, boxes, image_shapes)`` takes a dictionary of ``[N, C, H_i, W_i]``, a list of one ``[L, 4]`` per
    image and the ``(height, width)`` of each image before padding, and returns ``[K, C, PH, PW]``.

    Differs from torchvision where levels are left out (maps at 1/8 and 1/32, say): torchvision counts the maps as
    consecutive levels and returns zeros for regions past the last (here those that ask for 1/32). Here each is pooled
    from the map of its level, or the next coarser one where its level is missing.

    Example:
        >>> import torch, fastcv
        >>> pool = fastcv.ops.MultiScaleRoIAlign(["0", "1"], 7, 2)
        >>> maps = {"0": torch.rand(1, 8, 64, 64), "1": torch.rand(1, 8, 32, 32)}
        >>> pool(maps, [torch.tensor([[0., 0., 40., 30.]])], [(256, 256)]).shape
        torch.Size([1, 8, 7, 7])
    """

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int | tuple[int] | list[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
    ):
        super().__init__()
        self.featmap_names = featmap_names
        self.output_size = pair("output_size", output_size)
        self.sampling_ratio = sampling_ratio
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        maps = [map for name, map in x.items() if name in self.featmap_names]
        if not maps:
            raise ValueError(f"x: expected maps named {self.featmap_names}, got {list(x)}")
        if not image_shapes:
            raise ValueError("image_shapes: expected the (height, width) of at least one image, got none")
        image_height = max(shape[0] for shape in image_shapes)
        scales = [2.0 ** round(math.log2(map.shape[-2] / image_height)) for map in maps]
        return multiscale_roi_align(
            maps, boxes, self.output_size, scales, self.sampling_ratio,
            canonical_scale=self.canonical_scale, canonical_level=self.canonical_level,
        )  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(featmap_names={self.featmap_names}, output_size={self.output_size}, "
            f"sampling_ratio={self.sampling_ratio})"
        )


# ---- fake kernels --------------------------------------------------------------------------------


@torch.library.register_fake("fastcv::multiscale_roi_align", lib=LIBRARY)
def _(inputs, boxes, spatial_scales, pooled_height, pooled_width, *_):
    return fake_pooled(inputs[0], boxes, inputs[0].shape[1], pooled_height, pooled_width)


@torch.library.register_fake("fastcv::multiscale_roi_align_backward", lib=LIBRARY)
def _(grad, boxes, spatial_scales, pooled_height, pooled_width, batch_size, channels, heights, widths, *_):
    memory_format = torch._prims_common.suggest_memory_format(grad)
    return [
        torch.empty((batch_size, channels, h, w), dtype=grad.dtype, device=grad.device, memory_format=memory_format)
        for h, w in zip(heights, widths, strict=True)
    ]


# ---- derivatives: the operator is linear in its maps, so each is the other's ----------------------------


def _setup_forward(ctx, inputs, output):
    maps, boxes, *ctx.constants = inputs
    ctx.save_for_backward(boxes)
    # Tangents of maps without one are zeros of these shapes.
    ctx.save_for_forward(boxes, *maps)
    ctx.sizes = [*maps[0].shape[:2], [m.shape[2] for m in maps], [m.shape[3] for m in maps]]


def _backward_of_forward(ctx, grad):
    (boxes,) = ctx.saved_tensors
    scales, height, width, *rest = ctx.constants
    gradients = torch.ops.fastcv.multiscale_roi_align_backward(grad, boxes, scales, height, width, *ctx.sizes, *rest)
    return list(gradients), *[None] * 8


def _jvp_of_forward(ctx, tangents, *_):
    boxes, *maps = ctx.saved_tensors
    tangents = [torch.zeros_like(m) if t is None else t for t, m in zip(tangents, maps, strict=True)]
    return torch.ops.fastcv.multiscale_roi_align(tangents, boxes, *ctx.constants)


def _setup_backward(ctx, inputs, output):
    _, boxes, *ctx.constants = inputs
    ctx.save_for_backward(boxes)
    ctx.save_for_forward(boxes)


def _backward_of_backward(ctx, grads):
    (boxes,) = ctx.saved_tensors
    scales, height, width, _, _, _, _, *rest = ctx.constants
    gradient = torch.ops.fastcv.multiscale_roi_align(list(grads), boxes, scales, height, width, *rest)
    return gradient, *[None] * 12


def _jvp_of_backward(ctx, tangent, *_):
    (boxes,) = ctx.saved_tensors
    return torch.ops.fastcv.multiscale_roi_align_backward(tangent, boxes, *ctx.constants)


register_autograd(
    "multiscale_roi_align", setup_context=_setup_forward, backward=_backward_of_forward, jvp=_jvp_of_forward
)
register_autograd(
    "multiscale_roi_align_backward", setup_context=_setup_backward, backward=_backward_of_backward, jvp=_jvp_of_backward
)


# ---- vmap: the mapped dimension joins the images ---------------------------------------------------


def _vmap(info, in_dims, inputs, boxes, *constants):
    size = info.batch_size
    maps = [fold_images(m, d, size) for m, d in zip(inputs, in_dims[0], strict=True)]
    rois = fold_rois(boxes, in_dims[1], size, maps[0].shape[0] // size)
    pooled = torch.ops.fastcv.multiscale_roi_align(maps, rois, *constants)
    return pooled.unflatten(0, (size, -1)), 0


def _backward_vmap(info, in_dims, grad, boxes, scales, height, width, images, *rest):
    size = info.batch_size
    gradients = torch.ops.fastcv.multiscale_roi_align_backward(
        front(grad, in_dims[0], size).flatten(0, 1), fold_rois(boxes, in_dims[1], size, images),
        scales, height, width, images * size, *rest,
    )  # fmt: skip
    return [g.unflatten(0, (size, images)) for g in gradients], [0] * len(gradients)


torch.library.register_vmap("fastcv::multiscale_roi_align", _vmap, lib=LIBRARY)
torch.library.register_vmap("fastcv::multiscale_roi_align_backward", _backward_vmap, lib=LIBRARY)
