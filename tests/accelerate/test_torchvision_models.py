"""accelerate on every model of torchvision but the video ones: the same outputs, and the same detections."""

import pytest
import torch

import fastcv
from fastcv.accelerate import whole_detector

torchvision = pytest.importorskip("torchvision")
pytestmark = pytest.mark.slow

DETECTION = torchvision.models.list_models(torchvision.models.detection)
SEGMENTATION = torchvision.models.list_models(torchvision.models.segmentation)
CLASSIFICATION = torchvision.models.list_models(torchvision.models)
TOLERANCE = 1e-4  # of the largest output


def build(name, **options):
    """Random weights from a fixed seed, batch norms with statistics of their own."""
    torch.manual_seed(0)
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if name in DETECTION or name in SEGMENTATION:
        options["weights_backbone"] = None
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    for module in model.modules():
        if type(module).__name__ in ("BatchNorm2d", "FrozenBatchNorm2d"):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.5)
    return model


def leaves(result):
    return torch.utils._pytree.tree_leaves(result)


@pytest.mark.parametrize("name", CLASSIFICATION + SEGMENTATION)
def test_outputs(name):
    model = build(name)
    size = 299 if name == "inception_v3" else getattr(model, "image_size", 224)
    fast = fastcv.accelerate(model)
    with torch.inference_mode():
        for batch in (1, 2):
            x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))
            expected = leaves(model(x))
            fast(x)
            for result, wanted in zip(leaves(fast(x)), expected, strict=True):
                assert result.shape == wanted.shape and result.dtype == wanted.dtype
                assert (result - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def spread_scores(model, image):
    """Scale the layers that give scores to the spread of trained ones: those of random weights are nearly equal, and
    have no order that survives rounding."""

    def scale(module, inputs, output):
        handles.pop(module).remove()
        module.weight.mul_(3 / output.std())

    names = ("cls_logits", "cls_score", "classification_head.module_list", "bbox_ctrness")
    layers = [m for n, m in model.named_modules() if any(part in n for part in names)]
    layers = [m for m in layers if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) and m.bias is not None]
    handles = {m: m.register_forward_hook(scale) for m in layers}
    with torch.no_grad():
        model([image])


def test_ssdlite():
    """Its features hardly vary with random weights, nor do scores: what is compared is what the head gives."""
    model = build("ssdlite320_mobilenet_v3_large")
    fast, x = fastcv.accelerate(model), torch.rand(1, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.head(list(model.backbone(x).values()))
        for _ in range(2):
            result = fast.head(list(fast.backbone(x).values()))
    for key, wanted in expected.items():
        assert (result[key] - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("name", [name for name in DETECTION if not name.startswith("ssdlite")])
def test_detections(name):
    options = {} if "rcnn" not in name else {"box_score_thresh": 0.0}
    model = build(name, **options)
    image = torch.rand(3, 320, 400, generator=torch.Generator().manual_seed(0))
    spread_scores(model, image)
    fast = fastcv.accelerate(model)
    with torch.inference_mode():
        expected = model([image])[0]
        fast([image])
        check_detections(fast([image])[0], expected)
        check_detections(whole_detector(model)([image])[0], expected)


def check_detections(result, expected):
    assert result.keys() == expected.keys() and len(expected["labels"]) > 0
    assert abs(len(result["labels"]) - len(expected["labels"])) <= 0.05 * len(expected["labels"])
    # Every detection has its like; a few lie on the edge of a threshold.
    far = (result["boxes"][:, None] - expected["boxes"]).abs().amax(2)
    same = (far < 0.05) & (result["labels"][:, None] == expected["labels"])
    same &= (result["scores"][:, None] - expected["scores"]).abs() < 1e-4
    # Of those as good as the worst rounding decides which are among the most that a model gives.
    certain = result["scores"] > expected["scores"].min() + 1e-4
    assert certain.sum() >= 10 and same[certain].any(1).float().mean() >= 0.95
    pairs = same.float().argmax(1)[same.any(1)]
    for key in {"masks", "keypoints"} & result.keys():
        difference = (result[key][same.any(1)] - expected[key][pairs]).abs()
        assert difference.flatten(1).amax(1).median() <= 1e-3 * expected[key].abs().max()
