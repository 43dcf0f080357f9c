"""upsample_conv2d: by hand, against upsampling and convolution one after the other, derivatives, errors."""

import pytest
import torch
import torch.nn.functional as F

import fastcv

FORMATS = (torch.contiguous_format, torch.channels_last)


def separate(x, weight, bias=None, scale=2):
    x = F.interpolate(x, scale_factor=scale)
    return F.conv2d(x, weight, bias, padding=[k // 2 for k in weight.shape[2:]])


def case(kernel=(3, 3), dtype=torch.float64, memory_format=torch.contiguous_format, channels=3, outputs=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 5, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, channels, *kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(outputs, generator=generator, dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=memory_format), weight.to(dtype), bias.to(dtype)


def test_by_hand():
    """[1, 2] becomes [1, 1, 2, 2]; with kernel [1, 10, 100] the outputs are two taps each, of weights summed."""
    x, weight = torch.tensor([1.0, 2]).reshape(1, 1, 1, 2), torch.tensor([1.0, 10, 100]).reshape(1, 1, 1, 3)
    assert fastcv.ops.upsample_conv2d(x, weight)[0, 0].tolist() == [[110, 211, 221, 22]] * 2


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (5, 3), (7, 5), (1, 9)])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_equals_both(kernel, scale, memory_format):
    for dtype in (torch.float64, torch.float32):
        x, weight, bias = case(kernel, dtype, memory_format)
        with torch.no_grad():
            out = fastcv.ops.upsample_conv2d(x, weight, bias, scale)
        expected = separate(x.double(), weight.double(), bias.double(), scale)
        tolerance = 1e-12 if dtype == torch.float64 else 5e-4
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        assert out.dtype == dtype and out.is_contiguous(memory_format=memory_format)


def test_half_types_and_activation():
    for dtype in (torch.float16, torch.bfloat16):
        x, weight, bias = case(dtype=dtype)
        expected = separate(x.double(), weight.double(), bias.double()).relu()
        out = fastcv.ops.upsample_conv2d(x, weight, bias, activation="relu")
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps * 4)


def test_changed_weights_are_noticed():
    x, weight, _ = case(dtype=torch.float32)
    with torch.no_grad():
        for _ in range(2):
            first = fastcv.ops.upsample_conv2d(x, weight)
            torch.testing.assert_close(first, separate(x, weight), rtol=1e-4, atol=5e-4)
            weight.mul_(2)
        for scale in (3, 2):
            out = fastcv.ops.upsample_conv2d(x, weight, None, scale)
            torch.testing.assert_close(out, separate(x, weight, None, scale), rtol=1e-4, atol=5e-4)
    with torch.inference_mode():
        out = fastcv.ops.upsample_conv2d(x, weight)
        torch.testing.assert_close(out, separate(x, weight), rtol=1e-4, atol=5e-4)


def test_empty():
    x, weight, bias = case()
    assert fastcv.ops.upsample_conv2d(x[:0], weight, bias).shape == (0, 4, 10, 8)


def test_derivatives():
    x, weight, bias = (t.requires_grad_() for t in case(channels=1, outputs=2))
    x = x.detach()[:1, :, :2, :2].requires_grad_()
    assert torch.autograd.gradcheck(fastcv.ops.upsample_conv2d, (x, weight, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fastcv.ops.upsample_conv2d, (x, weight, bias))


def test_compile():
    x, weight, bias = case(dtype=torch.float32)
    compiled = torch.compile(fastcv.ops.upsample_conv2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), separate(x, weight, bias), rtol=1e-4, atol=5e-4)


def test_errors():
    x, weight, bias = case()
    f = fastcv.ops.upsample_conv2d
    for bad, match in (
        (lambda: f(x[0], weight), "input: expected shape"),
        (lambda: f(x, weight[:, :2]), "weight: expected shape"),
        (lambda: f(x, weight[..., :2]), "weight: expected a kernel of odd sizes"),
        (lambda: f(x, weight, bias[:1]), "bias: expected shape"),
        (lambda: f(x, weight, bias, 1.5), "scale_factor: expected an int of at least 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()


def test_layer():
    torch.manual_seed(0)
    layer = fastcv.nn.UpsampleConv2d(3, 4, 3)
    plain = torch.nn.Conv2d(3, 4, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, 3, 5, 6)
    expected = plain(F.interpolate(x, scale_factor=2))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert repr(layer) == "UpsampleConv2d(3, 4, kernel_size=3, scale_factor=2)"
