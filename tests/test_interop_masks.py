"""paste_masks_in_image in torchvision's detectors: by the patch and by accelerate."""

import pytest
import torch
from test_interop_torchvision import Recorder

import fastcv
from fastcv.accelerate._detection import replace_operators

roi_heads = pytest.importorskip("torchvision.models.detection.roi_heads")
transform = pytest.importorskip("torchvision.models.detection.transform")


def detections(size=(28, 28)):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(20, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 2 + torch.rand(20, 2, generator=generator) * 50], 1)
    return torch.rand(20, 1, *size, generator=generator), boxes


def test_patch():
    masks, boxes = detections()
    paste = roi_heads.paste_masks_in_image
    expected = paste(masks, boxes, (90, 100))
    with fastcv.patched("torchvision"):
        functions = fastcv.build_info()["patched"]["torchvision"]["functions"]
        with Recorder() as recorder:
            actual = paste(masks, boxes, (90, 100), padding=1)
        scripted = torch.jit.script(paste)
        torch.testing.assert_close(scripted(masks, boxes, (90, 100)), expected, rtol=0, atol=2e-5)
        assert transform.paste_masks_in_image is paste
    assert "torchvision.models.detection.roi_heads.paste_masks_in_image" in functions
    assert "fastcv::paste_masks_in_image" in recorder.names
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
    assert torch.equal(paste(masks, boxes, (90, 100)), expected)


def test_masks_that_are_not_square_are_left_to_torchvision():
    masks, boxes = detections((14, 28))
    expected = roi_heads.paste_masks_in_image(masks, boxes, (90, 100))
    with fastcv.patched("torchvision"):
        assert torch.equal(roi_heads.paste_masks_in_image(masks, boxes, (90, 100)), expected)


@pytest.mark.parametrize("size", [(28, 28), (14, 28)], ids=str)
def test_accelerate(size):
    model = transform.GeneralizedRCNNTransform(100, 200, [0.5] * 3, [0.2] * 3).eval()
    masks, boxes = detections(size)

    def run():
        results = [{"boxes": boxes.clone(), "masks": masks}]
        return model.postprocess(results, [(110, 120)], [(88, 96)])[0]["masks"]

    expected = run()
    assert replace_operators(model) == ["postprocess: paste_masks_in_image"]
    with Recorder() as recorder:
        actual = run()
    assert ("fastcv::paste_masks_in_image" in recorder.names) == (size[0] == size[1])
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
    assert replace_operators(model) == []
