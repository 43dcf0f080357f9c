"""Re-points torchvision's operators at fastcv's: ``fastcv.patch("torchvision")``.

What stays: signatures, shapes, types, the contiguous layout of outputs, and results to rounding.
What differs, always towards what the documentation of torchvision leads one to expect:

* ``batched_nms`` compares class ids instead of shifting coordinates by class: boxes with negative
  coordinates no longer suppress boxes of other classes, and neither large class ids nor float16
  coordinates lose precision;
* ``nms`` never keeps a box with NaN in its coordinates or score, gives ties to the lowest index,
  and accepts float16 and bfloat16 on the CPU;
* ``ps_roi_align`` gives 0, not NaN, for a region without samples;
* the gradient of ``ps_roi_pool`` is that of its output: torchvision's spreads over the map's last row
  and column too, which its forward pass leaves out;
* ``paste_masks_in_image`` gives zeros for a box outside the image, where torchvision raises;
* the RoI operators and ``deform_conv2d`` accept bfloat16, and features and boxes of different
  types;
* under ``torch.autocast`` on the CPU no operator fails and none copies its input to float32;
* second derivatives work, where torchvision raises;
* ``torch.func.jvp`` gives the true tangent, where torchvision silently gives zero.
"""

from __future__ import annotations

import sys
import types
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from .._library import OPERATORS as defined
from .._library import cpu_loaded, implementation, mend_command

if TYPE_CHECKING:
    from torchvision.ops.poolers import LevelMapper

# Where kernels were measured to be faster than torchvision's. Those for CUDA devices have not been timed on one yet:
# fastcv.ops uses them, and torchvision keeps its own.
DEVICES = ("cpu",)

# Operators without a gradient are re-pointed below autograd, so that graphs keep torchvision's
# node; those with one above it, so that their derivatives are fastcv's too.
OPERATORS = {
    "nms": False,
    "roi_align": True,
    "roi_pool": True,
    "ps_roi_align": True,
    "ps_roi_pool": True,
    "deform_conv2d": True,
}
# Where torchvision's autocast rule on the CPU copies to float32 and back.
AUTOCAST_OPERATORS = ("nms", "roi_align")


def _contiguous(result):
    if isinstance(result, Tensor):
        return result.contiguous()
    return tuple(r.contiguous() for r in result)


def _channel_mapping(result: Tensor) -> Tensor:
    """The input channel that each bin of a position-sensitive output ``[K, C, PH, PW]`` pools, int32."""
    size = result.shape[1:]
    channels = torch.arange(size.numel(), dtype=torch.int32, device=result.device)
    return channels.view(size).repeat(result.shape[0], 1, 1, 1)


def _redirect(name: str):
    """A kernel for ``torchvision::name`` that calls ``fastcv::name``.

    fastcv keeps channels-last; torchvision's outputs are always contiguous. Callers rely on it
    (``.view``), and so do graphs that were compiled before the patch.
    """
    operator = getattr(torch.ops.fastcv, name).default
    if name == "nms":

        def kernel(*args):
            return operator(*args)
    elif name.startswith("ps_roi"):

        def kernel(input, boxes, spatial_scale, pooled_height, pooled_width, *rest):
            result = operator(input, boxes, spatial_scale, pooled_height, pooled_width, *rest)
            return result.contiguous(), _channel_mapping(result)
    else:

        def kernel(*args):
            return _contiguous(operator(*args))

    kernel.__name__ = kernel.__qualname__ = f"fastcv_{name}"
    return kernel


def _register(library: torch.library.Library) -> list[str]:
    """Register all redirections; returns ``"operator (device)"`` for each."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    registered = []
    for device in map(str.upper, DEVICES):
        for name, has_gradient in OPERATORS.items():
            theirs = f"torchvision::{name}"
            if name not in defined or not torch._C._dispatch_has_kernel(theirs):
                continue
            if not has_kernel(theirs, device) or implementation(name, device.lower()) != "compiled":
                continue
            kernel = _redirect(name)
            keys = [device]
            if has_gradient:
                keys.append(f"Autograd{device}")
            if name in AUTOCAST_OPERATORS:
                keys.append(f"Autocast{device}")
            if has_gradient and not torch.accelerator.is_available():
                keys.append("FuncTorchBatched")  # torch.vmap, where torchvision loops; of no device in particular
            for key in keys:
                library.impl(name, kernel, key, allow_override=True)
            registered.append(f"{name} ({device.lower()})")
    return registered


# ---- compositions in Python ----------------------------------------------------------------------


def batched_nms(boxes, scores, idxs, iou_threshold):
    """Replaces torchvision's, which loops over classes or shifts coordinates by class."""
    if (
        torch.jit.is_tracing()  # graphs for TorchScript and ONNX hold torchvision's operators only
        or boxes.is_quantized
        or boxes.device.type not in _devices
    ):
        return _originals["batched_nms"](boxes, scores, idxs, iou_threshold)
    return ops.batched_nms(boxes, scores, idxs, iou_threshold)


def multiscale_roi_align(x_filtered, boxes, output_size, sampling_ratio, scales, mapper):
    """Replaces the loop over pyramid levels of ``torchvision.ops.MultiScaleRoIAlign``."""
    if (
        torch.jit.is_tracing()
        or x_filtered[0].device.type not in _devices
        or not is_plain_pyramid(x_filtered, scales, mapper)
    ):
        return _originals["_multiscale_roi_align"](x_filtered, boxes, output_size, sampling_ratio, scales, mapper)
    return ops.multiscale_roi_align(
        x_filtered,
        boxes,
        output_size,
        scales,
        sampling_ratio,
        canonical_scale=mapper.s0,
        canonical_level=mapper.lvl0,
    ).contiguous()


def paste_masks_in_image(masks, boxes, img_shape, padding=1):
    """Replaces torchvision's, which resizes, pads and stacks the masks of an image one after the other."""
    if torch.jit.is_tracing() or masks.device.type not in _devices or not pastes(masks):
        return _originals["paste_masks_in_image"](masks, boxes, img_shape, padding)
    return ops.paste_masks_in_image(masks, boxes, img_shape, padding)


def pastes(masks: Tensor) -> bool:
    """Whether torchvision gives the same: to both axes it gives the scale of the width."""
    return masks.dim() == 4 and masks.shape[1] == 1 and masks.shape[2] == masks.shape[3] > 0


def is_plain_pyramid(maps, scales, mapper) -> bool:
    """Several maps alike but for their size, one for each level, assigned by torchvision's rule.

    Anything else (types mixed by autocast, levels left out, a mapper of one's own) is left to torchvision.
    """
    first = maps[0]
    return (
        len(maps) > 1
        and scales is not None
        and type(mapper) is sys.modules["torchvision.ops.poolers"].LevelMapper
        and mapper.eps == 1e-6
        and len(maps) == len(scales) == mapper.k_max - mapper.k_min + 1
        and all(m.dtype == first.dtype and m.shape[:2] == first.shape[:2] for m in maps)
    )


_originals: dict[str, types.FunctionType] = {}
_devices = tuple(d for d in DEVICES if implementation("nms", d) == "compiled")


class _Swap:
    """Gives a function of torchvision another body.

    The function object stays, so those who imported it by name (``from torchvision.ops.boxes import
    batched_nms``), before or after, get the new body too, and the old one after ``undo``.
    """

    def __init__(self, function: types.FunctionType, body: types.FunctionType, replacement) -> None:
        self.function = function
        self.code = function.__code__
        original = types.FunctionType(self.code, function.__globals__, function.__name__, function.__defaults__)
        original.__annotations__ = function.__annotations__
        original.__module__ = function.__module__
        _originals[function.__name__] = original
        self.globals = {
            f"_fastcv_{function.__name__}": replacement,
            f"_torchvision_{function.__name__}": original,
        }
        function.__globals__.update(self.globals)
        function.__code__ = body.__code__

    def undo(self) -> None:
        self.function.__code__ = self.code
        # The names stay: TorchScript functions made meanwhile, and calls in flight, still read
        # them.


# The bodies run with the globals of torchvision's module. TorchScript compiles them as well, and
# takes the first branch.


def _batched_nms_body(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    if torch.jit.is_scripting():
        return _torchvision_batched_nms(boxes, scores, idxs, iou_threshold)  # noqa: F821
    else:  # TorchScript needs the two branches
        return _fastcv_batched_nms(boxes, scores, idxs, iou_threshold)  # noqa: F821


def _multiscale_roi_align_body(
    x_filtered: list[Tensor],
    boxes: list[Tensor],
    output_size: list[int],
    sampling_ratio: int,
    scales: list[float] | None,
    mapper: LevelMapper | None,
) -> Tensor:
    if torch.jit.is_scripting():
        return _torchvision__multiscale_roi_align(  # noqa: F821
            x_filtered, boxes, output_size, sampling_ratio, scales, mapper
        )
    else:
        return _fastcv__multiscale_roi_align(  # noqa: F821
            x_filtered, boxes, output_size, sampling_ratio, scales, mapper
        )


def _paste_masks_in_image_body(masks: Tensor, boxes: Tensor, img_shape: tuple[int, int], padding: int = 1) -> Tensor:
    if torch.jit.is_scripting():
        return _torchvision_paste_masks_in_image(masks, boxes, img_shape, padding)  # noqa: F821
    else:
        return _fastcv_paste_masks_in_image(masks, boxes, img_shape, padding)  # noqa: F821


# ---- apply and undo ------------------------------------------------------------------------------


class _Applied:
    def __init__(self, torchvision: types.ModuleType) -> None:
        self.library = torch.library.Library("torchvision", "IMPL")
        self.swaps: list[_Swap] = []
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*Overriding a previously registered")
                operators = _register(self.library)
            if "nms (cpu)" in operators:
                self._swap(torchvision.ops.boxes.batched_nms, _batched_nms_body, batched_nms)
            if "roi_align (cpu)" in operators:
                self._swap(
                    torchvision.ops.poolers._multiscale_roi_align,
                    _multiscale_roi_align_body,
                    multiscale_roi_align,
                )
                roi_heads = torchvision.models.detection.roi_heads
                self._swap(roi_heads.paste_masks_in_image, _paste_masks_in_image_body, paste_masks_in_image)
            functions = [f"{swap.function.__module__}.{swap.function.__name__}" for swap in self.swaps]
        except BaseException:
            self.undo()
            raise
        self.report = {"operators": operators, "functions": functions}
        self.cache_tag = torch.compiler.config.cache_key_tag
        torch.compiler.config.cache_key_tag = f"{self.cache_tag}fastcv"
        _reset_compiler()

    def _swap(self, function, body, replacement) -> None:
        self.swaps.append(_Swap(function, body, replacement))

    def undo(self) -> None:
        for swap in reversed(self.swaps):
            swap.undo()
        self.library._destroy()
        if hasattr(self, "cache_tag"):
            torch.compiler.config.cache_key_tag = self.cache_tag
        _reset_compiler()


def _reset_compiler() -> None:
    # Graphs compiled in the other state hold the other operators: those in memory go, those on disk
    # are kept apart by the tag.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def apply() -> _Applied:
    try:
        import torchvision
        import torchvision.ops
    except ImportError as error:
        raise ImportError(
            "fastcv.patch('torchvision') needs torchvision: pip install torchvision",
            name="torchvision",
        ) from error
    if not cpu_loaded:
        warnings.warn(
            "fastcv.patch('torchvision') changes nothing: fastcv's compiled kernels are not in "
            "use, and the reference path would be slower than torchvision. To mend this, run: " + mend_command(),
            RuntimeWarning,
            stacklevel=5,
        )
    return _Applied(torchvision)
