"""Operators that detectors call in their own Python: non-maximum suppression, RoIAlign over a feature pyramid, masks.

torchvision's methods look them up in the globals of their module. An accelerated model gets methods of its own, with
the same code and other globals: nothing outside the model changes (``fastcv.patch`` is for that).
"""

from __future__ import annotations

import sys
import types

from torch import nn

from .. import ops

# Of any class whose module imports torchvision.ops.boxes as box_ops, as those in torchvision.models.detection do.
_POSTPROCESSING = ("filter_proposals", "postprocess_detections")


class _Boxes(types.SimpleNamespace):
    """``torchvision.ops.boxes`` with fastcv's ``batched_nms``."""

    def __getattr__(self, name: str):
        return getattr(sys.modules["torchvision.ops.boxes"], name)


class Method:
    """A method of a module's class that sees other globals. Replaces it on one object."""

    def __init__(self, module: nn.Module, name: str, replaced: dict[str, object]):
        self.module, self.name, self.replaced = module, name, replaced
        self._function: types.FunctionType | None = None

    def __call__(self, *args, **kwargs):
        if self._function is None:
            original = getattr(type(self.module), self.name)
            scope = {**original.__globals__, **self.replaced}
            self._function = types.FunctionType(
                original.__code__, scope, original.__name__, original.__defaults__, original.__closure__
            )
            self._function.__kwdefaults__ = original.__kwdefaults__
        return self._function(self.module, *args, **kwargs)

    def __getstate__(self):
        return {**self.__dict__, "_function": None}


def pool_pyramid(maps, boxes, output_size, sampling_ratio, scales, mapper):
    """Stands for torchvision's loop over the levels of ``MultiScaleRoIAlign``; the result keeps the maps' layout."""
    from ..interop.torchvision import is_plain_pyramid

    if not is_plain_pyramid(maps, scales, mapper):
        return sys.modules["torchvision.ops.poolers"]._multiscale_roi_align(
            maps, boxes, output_size, sampling_ratio, scales, mapper
        )
    return ops.multiscale_roi_align(
        maps, boxes, output_size, scales, sampling_ratio, canonical_scale=mapper.s0, canonical_level=mapper.lvl0
    )


def _calls_paste_masks(module: nn.Module) -> bool:
    function = getattr(type(module), "postprocess", None)
    roi_heads = sys.modules.get("torchvision.models.detection.roi_heads")
    return (
        isinstance(function, types.FunctionType)
        and roi_heads is not None
        and function.__globals__.get("paste_masks_in_image") is roi_heads.paste_masks_in_image
    )


def paste_masks(masks, boxes, img_shape, padding=1):
    from ..interop.torchvision import pastes

    function = ops if pastes(masks) else sys.modules["torchvision.models.detection.roi_heads"]
    return function.paste_masks_in_image(masks, boxes, img_shape, padding)


def replace_operators(model: nn.Module) -> list[str]:
    """Give detection methods of ``model`` fastcv's operators; returns what was replaced."""
    poolers = sys.modules.get("torchvision.ops.poolers")
    if poolers is None:  # torchvision was not imported: no module of the model can be its
        return []
    boxes, replaced = sys.modules["torchvision.ops.boxes"], []
    for name, module in model.named_modules():
        if type(module) is poolers.MultiScaleRoIAlign and "forward" not in module.__dict__:
            module.__dict__["forward"] = Method(module, "forward", {"_multiscale_roi_align": pool_pyramid})
            replaced.append(f"{name}: RoIAlign over all levels at once")
        for method in _POSTPROCESSING:
            function = getattr(type(module), method, None)
            uses_boxes = isinstance(function, types.FunctionType) and function.__globals__.get("box_ops") is boxes
            if uses_boxes and method not in module.__dict__:
                scope = {"box_ops": _Boxes(batched_nms=ops.batched_nms)}
                module.__dict__[method] = Method(module, method, scope)
                replaced.append(f"{name}.{method}".lstrip(".") + ": batched_nms")
        if _calls_paste_masks(module) and "postprocess" not in module.__dict__:
            module.__dict__["postprocess"] = Method(module, "postprocess", {"paste_masks_in_image": paste_masks})
            replaced.append(f"{name}.postprocess".lstrip(".") + ": paste_masks_in_image")
    return replaced
