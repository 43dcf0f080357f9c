"""paste_masks_in_image: by hand, against float64 and torchvision, all kinds of boxes, derivatives, errors."""

import pytest
import torch
from torch.library import opcheck

import fastcv
from fastcv import reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Inside, over every border of 40 x 50, outside, larger than the image, thin, of no area, inverted, not finite.
BOXES = [
    [10, 12, 30, 25], [0, 0, 49, 39], [-7.3, 5.2, 8.8, 20], [41.5, -3, 60, 9], [20, 33.4, 24, 47.9], [80, 80, 90, 99],
    [-30, -20, -9, -8], [-100, -200, 300, 250], [5, 5, 5.4, 30], [7, 9, 7, 9], [30, 30, 20, 20], [12, 20, 11.8, 30],
    [float("nan"), 1, 20, 20], [1, 1, 9, float("nan")], [float("-inf"), 2, float("inf"), 9], [-1e30, -1e30, 1e30, 1e30],
]  # fmt: skip


def boxes(dtype=torch.float32):
    return torch.tensor(BOXES, dtype=dtype)


def masks(count=16, size=(7, 7), dtype=torch.float32):
    return torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def paste(masks, boxes, image=(40, 50), padding=1):
    return fastcv.ops.paste_masks_in_image(masks, boxes, image, padding)


def exact(masks, boxes, image, padding):
    """In float64, but for the corners, which are cut to integers."""
    corners = reference.paste_masks_in_image.expanded_corners(boxes, masks.shape[2:], padding)
    return reference.paste_masks_in_image.paste_masks_in_image(masks.double(), corners, *image, padding)


def test_by_hand():
    """Two pixels over four, areas: a quarter and three quarters; then cut at the image's left."""
    mask = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)
    expected = [0, 0, 0.25, 0.75, 1, 0]
    assert paste(mask, torch.tensor([[1.0, 0, 4, 0]]), (1, 6), 0).flatten().tolist() == expected
    assert paste(mask, torch.tensor([[-2.0, 0, 1, 0]]), (2, 3), 0).tolist() == [[[[0.75, 1, 0], [0, 0, 0]]]]


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("size", [(7, 7), (28, 28), (1, 1), (3, 11)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype, size, padding):
    for image in ((40, 50), (1, 200), (131, 7)):
        x = masks(size=size, dtype=dtype)
        out = paste(x, boxes(), image, padding)
        assert out.dtype == dtype and out.shape == (len(BOXES), 1, *image) and out.is_contiguous()
        error = (out.double() - exact(x, boxes(), image, padding)).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps + (1e-13 if dtype == torch.float64 else 2e-5)


def test_tall_images_go_in_bands():
    x, image = masks(3), (700, 300)
    place = torch.tensor([[20.0, 30, 280, 640], [0, 0, 299, 699], [250, 600, 400, 800]])
    assert (paste(x, place, image).double() - exact(x, place, image, 1)).abs().max() < 2e-5


@pytest.mark.parametrize("box_dtype", DTYPES)
def test_boxes_of_another_type(box_dtype):
    place = boxes(box_dtype)
    wide = place if box_dtype == torch.float64 else place.float()
    assert torch.equal(paste(masks(), place), paste(masks(), wide))


def test_strided_tensors():
    x = masks(2 * len(BOXES), (7, 9))
    assert torch.equal(paste(x[::2, :, :, 1:8], boxes()), paste(x[::2, :, :, 1:8].contiguous(), boxes()))
    assert torch.equal(paste(masks(), boxes().t().contiguous().t()), paste(masks(), boxes()))


def test_empty():
    assert paste(masks(0), torch.empty(0, 4)).shape == (0, 1, 40, 50)
    assert paste(masks(), boxes(), (0, 50)).shape == (len(BOXES), 1, 0, 50)
    assert paste(masks(), boxes(), (40, 0)).numel() == 0


def test_nothing_is_pasted():
    out = paste(torch.ones(len(BOXES), 1, 7, 7), boxes(), padding=0).sum((1, 2, 3))
    assert [i for i, total in enumerate(out.tolist()) if not total] == [5, 6, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_torchvision(padding):
    roi_heads = pytest.importorskip("torchvision.models.detection.roi_heads")
    image, generator = (120, 160), torch.Generator().manual_seed(1)
    corner = torch.rand(60, 2, generator=generator) * torch.tensor([190.0, 150]) - 20
    place = torch.cat([corner, corner + torch.rand(60, 2, generator=generator) * 90], 1)
    # What lies outside the image torchvision cannot paste.
    place = place[(place[:, 0] < 150) & (place[:, 1] < 110) & (place[:, 2] > 5) & (place[:, 3] > 5)]
    x = masks(len(place), (28, 28))
    expected = roi_heads.paste_masks_in_image(x, place, image, padding)
    assert len(place) > 40
    torch.testing.assert_close(paste(x, place, image, padding), expected, rtol=0, atol=2e-5)


def test_derivatives():
    x = masks(4, (3, 4), torch.float64).requires_grad_()
    place = torch.tensor([[1.0, 1, 6, 5], [-2, 3, 4, 9], [0, 0, 0.5, 0.5], [30, 0, 40, 4]])
    for function in (lambda m: paste(m, place, (7, 8)), lambda m: paste(m, place, (7, 8)) ** 2):
        torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
        torch.autograd.gradgradcheck(function, x)


def test_vmap():
    x, place = masks(6, (3, 3)).unflatten(0, (3, 2)), boxes()[:6].unflatten(0, (3, 2))
    together = torch.vmap(lambda m, b: paste(m, b))(x, place)
    assert torch.equal(together, torch.stack([paste(m, b) for m, b in zip(x, place, strict=True)]))
    shared = torch.vmap(lambda m: paste(m, place[0]))(x)
    assert torch.equal(shared, torch.stack([paste(m, place[0]) for m in x]))


def test_opcheck():
    corners = reference.paste_masks_in_image.expanded_corners(boxes()[:4], (7, 7), 1)
    opcheck(torch.ops.fastcv.paste_masks_in_image, (masks(4).requires_grad_(), corners, 40, 50, 1))


def test_compile():
    compiled = torch.compile(lambda m, b: paste(m, b) > 0.5, fullgraph=True)
    assert torch.equal(compiled(masks(), boxes()), paste(masks(), boxes()) > 0.5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(masks=torch.zeros(2, 1, 7, 7, dtype=torch.uint8)), TypeError, "masks: expected float32"),
        (dict(masks=torch.zeros(2, 3, 7, 7)), ValueError, r"masks: expected shape \[N, 1, MH, MW\]"),
        (dict(masks=torch.zeros(2, 1, 0, 7)), ValueError, "masks: expected masks of at least a pixel"),
        (dict(boxes=torch.zeros(3, 4)), ValueError, r"boxes: expected shape \[2, 4\]"),
        (dict(boxes=torch.zeros(2, 4, dtype=torch.int64)), TypeError, "boxes: expected float32"),
        (dict(boxes=torch.zeros(2, 4, device="meta")), ValueError, "boxes: expected the device of masks"),
        (dict(image=(4, -1)), ValueError, "img_shape: expected"),
        (dict(padding=-1), ValueError, "padding: expected an int from 0"),
        (dict(padding=0.5), ValueError, "padding: expected an int from 0"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        paste(**{"masks": torch.zeros(2, 1, 7, 7), "boxes": torch.zeros(2, 4), **change})


def test_kernel_raises_on_what_would_be_unsafe():
    run, x = torch.ops.fastcv.paste_masks_in_image, torch.zeros(2, 1, 7, 7)
    far = torch.tensor([[-(2**63), 0, 2**63 - 1, 5], [0, -(2**63), 3, 2**63 - 1]])
    assert run(x + 1, far, 4, 4, 1).isfinite().all()
    for arguments in ((x, far[:1], 4, 4, 1), (x, far.int(), 4, 4, 1), (x, far, -1, 4, 1), (x, far, 4, 4, -1)):
        with pytest.raises(RuntimeError, match="expected"):
            run(*arguments)
