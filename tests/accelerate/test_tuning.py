"""Which kernels programs use: those that a precision allows, and those that tune measured to be faster."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastcv
from fastcv.ops.conv2d import KERNELS

if fastcv.build_info()["operators"]["conv2d"]["cpu"] != "compiled":
    pytest.skip("the compiled part is not built", allow_module_level=True)


def first_kernel(fast, x):
    return KERNELS[fast.fastcv_report.parts[0].programs[0].profile(x)[0, 1]]


@pytest.mark.parametrize(
    ("size", "pixels", "expected"),
    [
        (3, 114, {"default": "winograd", "highest": "gemm", "fast": "winograd_6x6"}),
        (3, 14, {"default": "winograd", "highest": "gemm", "fast": "winograd"}),
        (5, 40, {"default": "winograd_5x5", "highest": "gemm", "fast": "winograd_5x5_4x4"}),
    ],
)
def test_precision_chooses_winograds_tiles(size, pixels, expected):
    model = nn.Sequential(nn.Conv2d(32, 32, size, padding=size // 2)).eval()
    x = torch.randn(1, 32, pixels, pixels)
    kernels = {}
    for precision in ("default", "highest", "fast"):
        fast = fastcv.accelerate(model, precision=precision)
        with torch.inference_mode():
            exact = F.conv2d(x.double(), model[0].weight.double(), model[0].bias.double(), padding=size // 2)
            assert (fast(x) - exact).abs().max() <= (5e-5 if precision == "fast" else 1e-5) * exact.abs().max()
            kernels[precision] = first_kernel(fast, x)
    assert kernels == expected


def test_wrong_precision_and_type():
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    for precision in ("highest", "fast"):
        with pytest.raises(ValueError, match='expected "default", or in float32 "highest" or "fast"'):
            fastcv.accelerate(model, dtype=torch.bfloat16, precision=precision)
    with pytest.raises(ValueError, match=r"precision: expected .* got 'faster'"):
        fastcv.accelerate(model, precision="faster")
    with pytest.raises(ValueError, match=r"expected torch.float32 or torch.bfloat16, got torch.float16"):
        fastcv.accelerate(model, dtype=torch.float16)


def test_tuning(tmp_path):
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 40, 1)).eval()
    fast, x = fastcv.accelerate(model), torch.randn(1, 16, 30, 31)
    with torch.inference_mode():
        expected = model(x)
    for choice in fastcv.tune(fast, x, file=tmp_path / "choices.json", rounds=2):
        assert choice["times_as_fast"] > 1
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)
    shape = {"input": [1, 16, 30, 31], "weight": [16, 16, 3, 3], "groups": 1}
    shape |= {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    file = tmp_path / "other.json"

    def kernel_after(name):
        file.write_text(json.dumps([{**shape, "kernel": name}]))
        fastcv.load_tuning(file)
        with torch.inference_mode():
            fast = fastcv.accelerate(model)
            fast(x)
            torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)
            return first_kernel(fast, x)

    assert kernel_after("winograd_2x2") == "winograd_2x2"
    assert kernel_after("gemm") == "gemm"
    assert kernel_after("auto") == "winograd"
    weight = torch.randn(16, 16, 3, 3)
    good = {**shape, "kernel": "gemm"}
    before = fastcv.ops.conv2d(x, weight, padding=1)
    for bad, message in (
        ({}, "expected a list, got dict"),
        ("x", "expected a list, got str"),
        ([1], "choice 0: expected a dictionary, got 1"),
        ([good, {}], "choice 1: input: expected 4 ints"),
        ([good, {**good, "kernel": "bf16"}], "choice 1: kernel: expected one of gemm, .* got 'bf16'"),
        ([good, {**good, "kernel": "amx"}], "choice 1: kernel: .* got 'amx'"),
        ([good, {**good, "kernel": "winograd_6x6"}], "choice 1: kernel: .* got 'winograd_6x6'"),
        ([good, {**good, "kernel": ["gemm"]}], "choice 1: kernel: "),
        ([good, {**good, "stride": [1]}], "choice 1: stride: expected 2 ints"),
        ([good, {**good, "groups": -1}], "choice 1: groups: expected an int"),
        ([good, {**good, "padding": [True, 1]}], "choice 1: padding: expected 2 ints"),
        ([good, {**good, "dilation": [1, 2**62]}], "choice 1: dilation: expected 2 ints"),
        ([good, {**good, "groups": 5}], "weight: expected"),
        ([good, {**good, "kernel": "depthwise"}], "does not serve"),
    ):
        file.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=rf"does not hold choices of fastcv\.tune \(.*{message}"):
            fastcv.load_tuning(file)
        assert torch.equal(fastcv.ops.conv2d(x, weight, padding=1), before)  # nothing of it is used
    file.write_text(json.dumps([good]))
    fastcv.load_tuning(file)
    file.write_text(json.dumps([{**good, "kernel": "winograd"}, {**good, "kernel": "depthwise"}]))
    with pytest.raises(ValueError, match="does not serve"):
        fastcv.load_tuning(file)
    assert torch.equal(fastcv.ops.conv2d(x, weight, padding=1), fastcv.ops.conv2d(x, weight, padding=1, kernel="gemm"))
    assert kernel_after("auto") == "winograd"
    file.write_text("nothing")
    with pytest.raises(ValueError, match="is not JSON"):
        fastcv.load_tuning(file)
    with pytest.raises(TypeError, match=r"expected what fastcv\.accelerate returned, got Sequential"):
        fastcv.tune(model, x)
