"""Whole detectors of torchvision that wait for the device once, at the end: :func:`whole_detector`."""

from __future__ import annotations

import sys
from threading import Lock

import torch
from torch import Tensor, nn

from ..ops._checks import check_floating, check_shape
from ._detection import Method, paste_masks
from ._graphs import Graphs
from ._heads import RCNN, SSD, fcos, retinanet
from ._modules import has_hooks
from ._program import ModelState
from ._report import Report
from ._steps import all_refs

_FUNCTIONS = {"GeneralizedRCNN": RCNN, "RetinaNet": retinanet, "FCOS": fcos, "SSD": SSD}
_METHODS = ("__call__", "forward", "eager_outputs", "postprocess_detections")  # of the model, and here in others' place
_POOLERS = ("box_roi_pool", "mask_roi_pool", "keypoint_roi_pool")


def whole_detector(model: nn.Module) -> WholeDetector:
    """A detector of torchvision whose detections are chosen on the device.

    torchvision asks after each step how many boxes are left, and a GPU idles meanwhile. Here all steps between the
    images and one copy of the numbers of detections to the host have fixed shapes: ``detect``, a function of tensors,
    which a CUDA graph can hold. (What draws masks into images and finds keypoints in heatmaps comes after that copy;
    the latter is torchvision's, and waits for every person.) On a CPU the model itself does less: it computes no rows
    that hold nothing.

    Args:
        model: ``FasterRCNN``, ``MaskRCNN``, ``KeypointRCNN``, ``RetinaNet``, ``FCOS`` or ``SSD`` of
            torchvision.models.detection, also one that :func:`fastcv.accelerate` made, with any backbone and any
            heads that are modules. Its parameters are shared.

    Returns:
        what is called as the model is, and gives the same, to rounding; equal scores are in the order of
        :func:`fastcv.ops.nms_padded`. In training mode, with targets and while gradients are enabled it is the model
        that is called. Regions are pooled at scales found from the height of the padded batch, or those that the model
        has found at an earlier call; torchvision finds them from the height without padding, which makes a difference
        below 80 pixels.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: another detector, or one in which something that would be left out was changed; says what.

    Example::

        model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights="DEFAULT").eval().cuda()
        detector = fastcv.whole_detector(model)
        with torch.inference_mode():
            detections = detector([image])  # a list of dictionaries, as of the model
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return WholeDetector(model)


class WholeDetector:
    """What :func:`whole_detector` gives. ``detect`` may be replaced by a function that calls it, as of a CUDA graph.

    Attributes:
        model: torchvision's.
        detect: ``(images, sizes, originals)`` to tensors; see :mod:`fastcv.accelerate._heads`.
        outputs: their names.
    """

    def __init__(self, model: nn.Module):
        reason = why_not(model)
        if reason is not None:
            raise ValueError(f"model: expected a detector of torchvision as it is, but {reason}")
        self.model = model
        self.detect = _FUNCTIONS[_base(model).__name__](model)
        self.outputs = self.detect.outputs
        self._statistics: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __call__(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        if not self._applies(images, targets):
            return self._own(images, targets)
        batch, sizes, originals = self.prepare(images)
        on_device = torch.tensor([sizes, originals], pin_memory=batch.is_cuda).to(batch.device, non_blocking=True)
        outputs = dict(zip(self.outputs, self.detect(batch, *on_device), strict=True))
        counts = outputs.pop("counts").tolist()  # the one time that the host waits
        return [
            self._result({name: output[i, :count] for name, output in outputs.items()}, sizes[i], originals[i])
            for i, count in enumerate(counts)
        ]

    def _applies(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None) -> bool:
        training = any(module.training for module in (self.model, *self.model.children()))
        return not (training or targets is not None or torch.is_grad_enabled())

    def _own(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None):
        return self.model(images, targets)

    def prepare(self, images: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]], list[tuple[int, int]]]:
        """The transform: the batch, and sizes of its images in it and before. The model's own makes the numbers that it
        normalises with a tensor for each image, which waits for the device."""
        if not images:
            raise ValueError("images: expected at least one, got none")
        transform, resized = self.model.transform, []
        for i, image in enumerate(images):
            check_floating(f"images[{i}]", image)
            check_shape(f"images[{i}]", image, ("C", "H", "W"))
            key = (image.dtype, image.device, *transform.image_mean, *transform.image_std)
            if key not in self._statistics:
                both = torch.tensor([transform.image_mean, transform.image_std], dtype=image.dtype)
                self._statistics[key] = both[:, :, None, None].to(image.device).unbind()
            mean, std = self._statistics[key]
            resized.append(transform.resize((image - mean) / std)[0])
        sizes, originals = ([tuple(image.shape[-2:]) for image in group] for group in (resized, images))
        return transform.batch_images(resized, transform.size_divisible), sizes, originals

    def _result(self, found: dict[str, Tensor], size: tuple[int, int], original: tuple[int, int]) -> dict[str, Tensor]:
        """One image's, of its own memory: that of a graph is written again."""
        result = {name: found[name].clone() for name in ("boxes", "labels", "scores")}
        if "masks" in found:
            result["masks"] = paste_masks(found["masks"][:, None], found["boxes"], original)
        if "heatmaps" in found:
            detection = sys.modules["torchvision.models.detection"]
            points, scores = detection.roi_heads.heatmaps_to_keypoints(found["heatmaps"], found["regions"])
            result["keypoints"] = detection.transform.resize_keypoints(points, size, original)
            result["keypoints_scores"] = scores
        return result


# ---- graphs --------------------------------------------------------------------------------------------------------


class _Replayed:
    """``detect`` as graphs, which are recorded again after a parameter of the model has changed."""

    def __init__(self, detect, model: nn.Module):
        self.graphs, self.model = Graphs(detect), model
        self._state: ModelState | None = None
        self._lock = Lock()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        with self._lock:
            if self._state is None or self._state.changed():
                self.graphs.clear()
                self._state = ModelState(all_refs(self.model))
        return self.graphs(*tensors)

    def __getstate__(self):
        return {**self.__dict__, "_state": None, "_lock": None}

    def __setstate__(self, state):
        self.__dict__ = {**state, "_lock": Lock()}


class ReplayedDetector(WholeDetector):
    """Stands for ``forward`` of a detector that was accelerated with ``graphs=True``: a graph from the padded batch to
    the detections, for each size of the batch. Images on the CPU, and calls under autocast, are the model's own."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.detect = _Replayed(self.detect, model)

    def _applies(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None) -> bool:
        return super()._applies(images, targets) and bool(images) and all(map(_on_gpu, images))

    def _own(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None):
        return type(self.model).forward(self.model, images, targets)


def _on_gpu(image: object) -> bool:
    return isinstance(image, Tensor) and image.is_cuda and not torch.is_autocast_enabled("cuda")


def replay_detections(model: nn.Module, report: Report) -> None:
    """Give a detector of torchvision, or say why not, a ``forward`` that replays graphs."""
    if _base(model) is None:
        return
    reason = why_not(model)
    if reason is not None:
        report.left.append(("", f"for its detections are no graph: {reason}"))
        return
    model.__dict__["forward"] = ReplayedDetector(model)
    report.operators.append("the model: detections as graphs, for each size of the batch")


# ---- which detectors -------------------------------------------------------------------------------------------


def _base(model: nn.Module) -> type[nn.Module] | None:
    """The class of torchvision's that the model is of."""
    detection = sys.modules.get("torchvision.models.detection")
    if detection is None:  # torchvision was not imported: no module can be its
        return None
    bases = (c for c in type(model).__mro__ if c.__module__.startswith(detection.__name__ + "."))
    return next((c for c in bases if c.__name__ in _FUNCTIONS), None)


def _changed(name: str, value: object, expected: type) -> str | None:
    """Why ``value``, an attribute of the model, cannot be left out; functions of fastcv's on it can."""
    if type(value) is not expected:
        return f"{name} is a {type(value).__name__}, not torchvision's {expected.__name__}"
    for key, own in vars(value).items():
        if callable(getattr(expected, key, None)) and not isinstance(own, (Method, WholeDetector)):
            return f"{name}.{key} was replaced"
    if isinstance(value, nn.Module) and has_hooks(value):
        return f"{name} has hooks"
    return None


def _parts(model: nn.Module, base: type[nn.Module]) -> list[tuple[str, object, type]]:
    """What the function does in the place of the model: name, value, the class that it must be of."""
    detection, poolers = sys.modules["torchvision.models.detection"], sys.modules["torchvision.ops.poolers"]
    anchors, coders = detection.anchor_utils, detection._utils
    parts = [("transform", detection.transform.GeneralizedRCNNTransform)]
    if base.__name__ == "GeneralizedRCNN":
        parts += [("rpn", detection.rpn.RegionProposalNetwork), ("roi_heads", detection.roi_heads.RoIHeads)]
        parts += [("rpn.anchor_generator", anchors.AnchorGenerator), ("rpn.box_coder", coders.BoxCoder)]
        parts += [("roi_heads.box_coder", coders.BoxCoder)]
        parts += [(f"roi_heads.{p}", poolers.MultiScaleRoIAlign) for p in _POOLERS if _get(model, f"roi_heads.{p}")]
    else:
        is_ssd, is_fcos = base.__name__ == "SSD", base.__name__ == "FCOS"
        parts += [("anchor_generator", anchors.DefaultBoxGenerator if is_ssd else anchors.AnchorGenerator)]
        parts += [("box_coder", coders.BoxLinearCoder if is_fcos else coders.BoxCoder)]
    return [(name, _get(model, name), expected) for name, expected in parts]


def _get(model: nn.Module, name: str) -> object:
    for key in name.split("."):
        model = getattr(model, key, None)
    return model


def why_not(model: nn.Module) -> str | None:
    """Why :func:`whole_detector` leaves this model as it is; None where it does not."""
    base = _base(model)
    if base is None:
        return f"{type(model).__name__} is none"
    for method in _METHODS:
        if getattr(type(model), method, None) is not getattr(base, method, None):
            return f"{type(model).__name__} has a {method} of its own"
    reason = _changed("the model", model, type(model))
    return reason or next(filter(None, (_changed(*part) for part in _parts(model, base))), None)
