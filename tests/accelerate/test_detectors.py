"""whole_detector: the detections of torchvision's models, from a function that never waits for the device."""

import copy
import functools

import pytest
import torch
from program_cases import without_gpu
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastcv
from fastcv.accelerate import Report, _detectors, whole_detector
from fastcv.accelerate._detection import replace_operators
from fastcv.accelerate._padded import OUT, best
from fastcv.demo.detector import same_detections

torchvision = pytest.importorskip("torchvision")
detection = torchvision.models.detection

CLASSES = 5
SIZES = {"min_size": 64, "max_size": 128}
RCNN = {"box_detections_per_img": 12, "rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 150, **SIZES}
ONE_STAGE = {"num_classes": CLASSES, "detections_per_img": 40, "topk_candidates": 30}
NAMES = ("faster", "one_level", "left_out", "one_scale", "mask", "keypoint", "retinanet", "fcos", "ssd")


class Stages(nn.Module):
    """A backbone: maps of 1/4, 1/8 and so on of the image."""

    def __init__(self, strides=(2, 2, 2, 2), channels=32):
        super().__init__()
        inputs = [3] + [channels] * (len(strides) - 1)
        self.stem = nn.MaxPool2d(2)
        self.stages = nn.ModuleList(
            nn.Conv2d(c, channels, 3, stride=s, padding=1) for c, s in zip(inputs, strides, strict=True)
        )
        self.out_channels = channels

    def forward(self, x):
        maps, x = {}, self.stem(x)
        for i, stage in enumerate(self.stages):
            maps[str(i)] = x = stage(x).relu()
        return maps


def anchors(levels=4, shapes=(0.5, 1.0, 2.0)):
    return detection.anchor_utils.AnchorGenerator(tuple((8 * 2**i,) for i in range(levels)), (shapes,) * levels)


def rcnn(build, names=("0", "1", "2", "3"), strides=(2, 2, 2, 2), **options):
    backbone = Stages(strides)
    options |= {
        "rpn_anchor_generator": anchors(),
        "rpn_score_thresh": 0.98,
        "rpn_nms_thresh": 0.4,
        "box_score_thresh": 0.0,
    }
    options["box_roi_pool"] = torchvision.ops.MultiScaleRoIAlign(names, 7, 2, canonical_scale=40)
    options["box_head"] = detection.faster_rcnn.TwoMLPHead(32 * 49, 32)
    options["box_predictor"] = detection.faster_rcnn.FastRCNNPredictor(32, CLASSES)
    return build(backbone, None, **RCNN, **options)


def mask_rcnn():
    head = detection.mask_rcnn.MaskRCNNHeads(32, (8,), 1)
    return rcnn(detection.MaskRCNN, mask_head=head, mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(8, 8, CLASSES))


def keypoint_rcnn():
    head = detection.keypoint_rcnn.KeypointRCNNHeads(32, (8,))
    predictor = detection.keypoint_rcnn.KeypointRCNNPredictor(8, 3)
    return rcnn(detection.KeypointRCNN, keypoint_head=head, keypoint_predictor=predictor)


def ssd():
    generator = detection.anchor_utils.DefaultBoxGenerator([[2], [2, 3], [2]])
    backbone = Stages((2, 2, 2))
    head = detection.ssd.SSDHead([32] * 3, generator.num_anchors_per_location(), CLASSES)
    return detection.ssd.SSD(
        backbone, generator, (64, 80), head=head, score_thresh=0.0, **ONE_STAGE | {"topk_candidates": 8}
    )


BUILD = {
    "faster": lambda: rcnn(detection.FasterRCNN),
    "one_level": lambda: rcnn(detection.FasterRCNN, names=("1",)),
    "left_out": lambda: rcnn(detection.FasterRCNN, names=("0", "2")),
    "one_scale": lambda: rcnn(detection.FasterRCNN, names=("1", "2"), strides=(2, 2, 1, 2)),
    "mask": mask_rcnn,
    "keypoint": keypoint_rcnn,
    "retinanet": lambda: detection.RetinaNet(Stages(), anchor_generator=anchors(), **SIZES, **ONE_STAGE),
    "fcos": lambda: detection.FCOS(Stages(), anchor_generator=anchors(shapes=(1.0,)), **SIZES, **ONE_STAGE),
    "ssd": ssd,
}
SPREAD = {"cls_logits": 2, "cls_score": 2, "classification_head.module_list": 2, "ctrness": 1, "mask_fcn_logits": 2}
SPREAD |= {"bbox_pred": 0.5, "bbox_reg": 0.5, "regression_head.module_list": 0.5, "kps_score_lowres": 2}


def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=generator) for size in ((70, 90), (130, 60), (64, 64))]


@functools.cache
def model_of(name):
    """Outputs of its heads spread as those of trained ones, so that scores have an order that survives rounding."""
    torch.manual_seed(1)
    model = BUILD[name]().eval()

    def spread(deviation):
        def scale(layer, inputs, output):
            if layer not in seen:
                seen.add(layer)
                layer.weight.mul_(deviation / output.std())
                return output * (deviation / output.std())

        return scale

    seen, hooks = set(), []
    for part, layer in model.named_modules():
        deviation = next((d for key, d in SPREAD.items() if key in part), None)
        if deviation and isinstance(layer, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            hooks.append(layer.register_forward_hook(spread(deviation)))
        if isinstance(layer, nn.Conv2d) and part.startswith("backbone"):
            nn.init.kaiming_normal_(layer.weight)
    with torch.no_grad():
        model(images())
        for hook in hooks:
            hook.remove()
        scores = torch.cat([result["scores"] for result in model(images())]).sort().values
    # Two thirds of them pass: some images have fewer detections than there is room for.
    holder_of(model).score_thresh = float(scores[len(scores) // 3 :][:2].mean())
    return model


def holder_of(model):
    """What has the threshold of the scores."""
    return getattr(model, "roi_heads", model)


def inputs_of(detector):
    batch, sizes, originals = detector.prepare(images())
    return batch, torch.tensor(sizes), torch.tensor(originals)


def check_equal(results, expected):
    for result, wanted in zip(results, expected, strict=True):
        assert set(result) == set(wanted)
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_the_same_detections(name):
    model = model_of(name)
    expected = model(images())
    replaced = copy.deepcopy(model)
    replace_operators(replaced)  # equal scores in the order of fastcv's suppression, classes not told apart by shifts
    results = whole_detector(model)(images())
    check_equal(results, replaced(images()))
    for result, wanted in zip(results, expected, strict=True):
        same_detections(result, wanted)
    counts = [len(result["labels"]) for result in results]
    assert min(counts) > 0 and len(set(counts)) > 1, counts


@pytest.mark.parametrize("name", ["mask", "keypoint", "ssd"])
@torch.inference_mode()
def test_nothing_found(name):
    model = copy.deepcopy(model_of(name))
    holder_of(model).score_thresh = 1.0
    check_equal(whole_detector(model)(images()), model(images()))


@pytest.mark.parametrize("name", ["faster", "retinanet"])
@torch.inference_mode()
def test_rows_beyond_the_count(name):
    detector = whole_detector(model_of(name))
    boxes, scores, labels, counts = detector.detect(*inputs_of(detector))
    most = boxes.shape[1]
    assert boxes.shape == (3, most, 4) and scores.shape == labels.shape == (3, most)
    assert (counts < most).any() and (counts > 0).all()
    for i, count in enumerate(counts):
        assert (scores[i, :count] > 0).all()
        assert not any(x[i, count:].any() for x in (boxes, scores, labels))


@torch.inference_mode()
def test_fewer_candidates_than_detections():
    model = copy.deepcopy(model_of("faster"))
    model.roi_heads.detections_per_img = 10_000
    detector = whole_detector(model)
    assert detector.detect(*inputs_of(detector))[0].shape == (3, 150 * (CLASSES - 1), 4)
    assert [len(r["labels"]) for r in detector(images())] == [len(r["labels"]) for r in model(images())]


@torch.inference_mode()
def test_other_numbers():
    """Offsets scaled, and boxes by the size that is left after clipping."""
    model = copy.deepcopy(model_of("faster"))
    model.roi_heads.box_coder.weights = (4.0, 5.0, 6.0, 7.0)
    model.rpn.min_size, model.rpn.score_thresh = 9.0, 0.5
    replaced = copy.deepcopy(model)
    replace_operators(replaced)
    check_equal(whole_detector(model)(images()), replaced(images()))


@torch.inference_mode()
def test_scales_of_the_pooler():
    """Those found at an earlier call, as in torchvision, else those of the padded images."""
    model = copy.deepcopy(model_of("faster"))
    pooler, expected = model.roi_heads.box_roi_pool, model(images())
    assert pooler.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    for scales in (pooler.scales, None):
        pooler.scales = scales
        check_equal(whole_detector(model)(images()), expected)
    pooler.scales = [1 / 8, 1 / 16, 1 / 32, 1 / 64]
    pooler.map_levels = torchvision.ops.poolers.LevelMapper(3, 6, 40)
    result = whole_detector(model)(images())
    replace_operators(model)
    check_equal(result, model(images()))


@torch.inference_mode()
def test_results_own_their_memory():
    """That of a graph's outputs is written again at its next run."""
    detector, kept = whole_detector(model_of("mask")), []
    detect = detector.detect
    detector.detect = lambda *args: kept.append(detect(*args)) or kept[-1]
    results = detector(images())
    copies = copy.deepcopy(results)
    for output in kept[0]:
        output.zero_()
    check_equal(results, copies)


def test_equal_scores_keep_their_order():
    scores, order, found = best(torch.tensor([[1.0, 2.0] * 40, [OUT, 3.0] + [OUT] * 78]), 60)
    assert order[0].tolist() == [*range(1, 80, 2), *range(0, 40, 2)]
    assert scores[1].tolist() == [3.0] + [0.0] * 59 and order[1, 0] == 1
    assert found.sum(1).tolist() == [60, 1]


@pytest.mark.parametrize("name", ["mask", "fcos"])
def test_of_an_accelerated_model(name):
    fast = fastcv.accelerate(model_of(name))
    detector = whole_detector(fast)
    with torch.inference_mode():
        for _ in range(2):
            for result, wanted in zip(detector(images()), model_of(name)(images()), strict=True):
                same_detections(result, wanted)


# ---- no waiting ----------------------------------------------------------------------------------------------


class NeverWaits(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: numbers and shapes taken from data, and copies between devices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs))
        masks = function.name() in ("aten::index.Tensor", "aten::index_put_") and any(
            x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)
        )
        asks = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(function.tags)
        if masks or (asks and function.name() != "aten::index.Tensor"):
            raise AssertionError(f"{function.name()} asks for data")
        if function.name() in ("fastcv::nms", "fastcv::batched_nms", "torchvision::nms"):
            raise AssertionError(f"{function.name()} has an output of as many rows as data say")
        result = function(*args, **(kwargs or {}))
        devices = {x.device.type for x in (*given, *tree_leaves(result)) if isinstance(x, torch.Tensor)}
        if len(devices) > 1 or devices - {self.device}:
            raise AssertionError(f"{function.name()} is on {sorted(devices)}")
        return result

    def __init__(self, device):
        super().__init__()
        self.device = device


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_detect_asks_for_no_data(name):
    detector = whole_detector(model_of(name))
    inputs = inputs_of(detector)
    expected = detector.detect(*inputs)
    with NeverWaits("cpu"):
        results = detector.detect(*inputs)
    assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))


def on_fake_gpu(model):
    """Gives the model fake tensors of a GPU as parameters, so that it can be called in the mode that is active."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, x in tensors.items():
                if x is not None:
                    fake = torch.empty(x.shape, dtype=x.dtype, device="cuda")
                    tensors[key] = nn.Parameter(fake, requires_grad=False) if tensors is module._parameters else fake
    return model


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_detect_needs_nothing_from_the_host(name):
    """As it would run on a GPU, without one: fake tensors there have shapes, but no data to ask for."""
    real = whole_detector(model_of(name))
    expected = real.detect(*inputs_of(real))
    batch, sizes, originals = (x.shape for x in inputs_of(real))
    model = copy.deepcopy(real.model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        detector = whole_detector(on_fake_gpu(model))
        inputs = [torch.empty(batch, device="cuda")]
        inputs += [torch.empty(size, dtype=torch.int64, device="cuda") for size in (sizes, originals)]
        detector.detect(*inputs)  # copies the anchors there
        with NeverWaits("cuda"):
            results = detector.detect(*inputs)
    assert [(r.shape, r.dtype) for r in results] == [(e.shape, e.dtype) for e in expected]


@torch.inference_mode()
def test_the_transform_needs_nothing_from_the_host():
    detector = whole_detector(model_of("faster"))
    expected = detector.prepare(images())
    wanted = detector.model.transform(images())[0]
    assert torch.equal(expected[0], wanted.tensors) and expected[1] == wanted.image_sizes
    with FakeTensorMode():
        fakes = [torch.empty(image.shape, device="cuda") for image in images()]
        detector.prepare(fakes)  # copies mean and deviation there
        with NeverWaits("cuda"):
            batch, *sizes = detector.prepare(fakes)
    assert batch.shape == expected[0].shape and tuple(sizes) == expected[1:]


@torch.no_grad()
def test_numbers_from_the_host_are_refused():
    """A number that becomes a tensor on the GPU is a copy that waits, as in torchvision's decoding."""
    coder = detection._utils.BoxCoder((1.0, 1.0, 1.0, 1.0))
    with FakeTensorMode():
        boxes = torch.empty(5, 4, device="cuda")
        with NeverWaits("cuda"), pytest.raises(AssertionError, match=r"is on \['cpu"):
            coder.decode_single(boxes, boxes)
        with NeverWaits("cuda"), pytest.raises(AssertionError, match=r"index.Tensor asks for data"):
            boxes[boxes[:, 0] > 0]


@pytest.mark.parametrize("name", ["faster", "retinanet", "ssd"])
@torch.inference_mode()
def test_the_models_themselves_ask(name):
    with pytest.raises(AssertionError, match=r"asks for data|as many rows"), NeverWaits("cpu"):
        model_of(name)(images())


# ---- what is left to the model -------------------------------------------------------------------------------


class Counting(torchvision.ops.MultiScaleRoIAlign):
    pass


def other_method(model):
    class Detector(type(model)):
        def postprocess_detections(self, *args):
            return super().postprocess_detections(*args)

    model.__class__ = Detector


CHANGES = {
    "Detector has a postprocess_detections of its own": ("retinanet", other_method),
    "roi_heads.box_roi_pool is a Counting, not torchvision's MultiScaleRoIAlign": (
        "faster",
        lambda model: setattr(model.roi_heads, "box_roi_pool", Counting(["0"], 7, 2)),
    ),
    "box_coder is a BoxLinearCoder, not torchvision's BoxCoder": (
        "ssd",
        lambda model: setattr(model, "box_coder", detection._utils.BoxLinearCoder()),
    ),
    "rpn.filter_proposals was replaced": ("faster", lambda m: setattr(m.rpn, "filter_proposals", lambda *a: a)),
    "transform has hooks": ("fcos", lambda model: model.transform.register_forward_hook(lambda *a: None)),
    "Linear is none": ("faster", lambda model: setattr(model, "__class__", nn.Linear)),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_changed_detectors(reason):
    name, change = CHANGES[reason]
    model = copy.deepcopy(model_of(name))
    change(model)
    with pytest.raises(ValueError, match=f"model: expected a detector of torchvision as it is, but {reason}"):
        whole_detector(model)


def test_own_backbones_and_subclasses_with_only_a_constructor():
    class Detector(detection.FasterRCNN):
        def __init__(self):
            super().__init__(Stages(), CLASSES, rpn_anchor_generator=anchors())

    assert whole_detector(Detector()).outputs == ("boxes", "scores", "labels", "counts")


def test_training_targets_and_gradients_are_the_models():
    model = copy.deepcopy(model_of("faster"))
    detector, calls = whole_detector(model), []
    detector.detect = lambda *args: calls.append(args)
    target = {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}
    with torch.inference_mode():
        detector(images(), [target] * 3)
    assert detector(images())[0]["boxes"].requires_grad
    assert set(detector.model.train()(images(), [target] * 3)) == set(detector(images(), [target] * 3))
    assert not calls


def test_errors():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        whole_detector("fasterrcnn")
    detector = whole_detector(model_of("faster"))
    with torch.inference_mode():
        with pytest.raises(ValueError, match="images: expected at least one, got none"):
            detector([])
        with pytest.raises(TypeError, match=r"images\[1\]: expected float32, .* got torch.uint8"):
            detector([torch.rand(3, 64, 64), torch.zeros(3, 64, 64, dtype=torch.uint8)])
        with pytest.raises(ValueError, match=r"images\[0\]: expected shape \[C, H, W\], got \[1, 3, 64, 64\]"):
            detector([torch.rand(1, 3, 64, 64)])


# ---- accelerate(graphs=True) ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mask", "retinanet"])
@torch.no_grad()
def test_as_graphs(name, monkeypatch):
    """Recorded for each size of the batch, and again after a parameter has changed; elsewhere the model's own."""
    records = without_gpu(monkeypatch)
    model, report = copy.deepcopy(model_of(name)), Report()
    replace_operators(model)
    expected = model(images())
    _detectors.replay_detections(model, report)
    assert report.operators == ["the model: detections as graphs, for each size of the batch"] and not report.left
    check_equal(model(images()), expected)
    assert not records  # images on the CPU
    monkeypatch.setattr(_detectors, "_on_gpu", lambda image: True)
    for _ in range(2):
        check_equal(model(images()), expected)
    assert [shapes[0] for shapes in records] == [(3, 3, 128, 96)]
    check_equal(model(images()[:1]), type(model).forward(model, images()[:1]))
    assert len(records) == 2
    twin = copy.deepcopy(model)  # records its own
    check_equal(twin(images()), expected)
    assert len(records) == 3 and twin.__dict__["forward"].model is twin
    for parameter in model.backbone.parameters():
        parameter.mul_(1.5)
    check_equal(model(images()), type(model).forward(model, images()))
    assert len(records) == 4
    check_equal(twin(images()), expected)
    assert len(records) == 4
    assert set(model.state_dict()) == set(model_of(name).state_dict())


def test_what_is_no_graph_is_said():
    report, model = Report(), copy.deepcopy(model_of("faster"))
    model.transform.register_forward_hook(lambda *arguments: None)
    _detectors.replay_detections(model, report)
    assert report.left == [("", "for its detections are no graph: transform has hooks")]
    assert "forward" not in model.__dict__
    report = Report()
    _detectors.replay_detections(nn.Linear(2, 2), report)
    assert not report.left and not report.operators
