"""``accelerate(low_memory=True)``: weights laid out at each run give the same bits as those that are kept."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastcv

if fastcv.build_info()["operators"]["conv2d"]["cpu"] != "compiled":
    pytest.skip("the compiled part is not built", allow_module_level=True)


def pieces(fast, x):
    """Of each step of the only program: making weights, using them, and so on; 1 where they are kept."""
    part, *_ = fast.fastcv_report.parts
    program, *_ = part.programs
    return program.profile(x, repeat=1)[:, 22].tolist()


class Block(nn.Module):
    """A residual block whose norms scale the outputs of its convolutions."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 1)
        self.second_norm = nn.BatchNorm2d(channels)
        for norm in (self.first_norm, self.second_norm):
            norm.weight.data.uniform_(0.5, 2)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return F.relu(self.second_norm(self.second(F.relu(self.first_norm(self.first(x))))) + x)


def transposed_and_norm(*arguments):
    norm = nn.BatchNorm2d(arguments[1])
    norm.weight.data.uniform_(0.5, 2)
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.ConvTranspose2d(*arguments, bias=False), norm, nn.ReLU())


def seeded(build):
    torch.manual_seed(0)
    return build().eval()


MODELS = {  # the model, the size of its input, the pieces of its steps (by threads, where they tell)
    "winograd": (lambda: nn.Conv2d(40, 72, 3, padding=1), (1, 40, 17, 19), [2]),
    "winograd_2x2": (lambda: nn.Conv2d(96, 130, 3, padding=1), (1, 96, 7, 7), [2]),
    "winograd_5x5": (lambda: nn.Conv2d(40, 40, 5, padding=2), (1, 40, 17, 19), [2]),
    "1x1": (lambda: nn.Conv2d(200, 100, 1), (2, 200, 9, 7), [2]),
    "strided": (lambda: nn.Conv2d(50, 70, 3, 2, 1), (2, 50, 19, 17), [2]),
    "7x7": (lambda: nn.Conv2d(17, 70, 7, 2, 3), (1, 17, 31, 29), [2]),
    "dilated": (lambda: nn.Conv2d(64, 64, 3, padding=2, dilation=2), (1, 64, 21, 20), [2]),
    "parts of the outputs": (lambda: nn.Conv2d(512, 200, 3, padding=1), (1, 512, 13, 13), [4]),
    "large filters": (lambda: nn.Conv2d(3000, 320, 3, 2), (1, 3000, 5, 5), {1: [10], 2: [6]}),
    "norms and residuals": (lambda: Block(200), (1, 200, 15, 14), [2, 2]),
    "layer used twice": (lambda: nn.Sequential(*[nn.Conv2d(72, 72, 3, padding=1)] * 2), (1, 72, 15, 14), [2, 2]),
    "linear layers of many rows": (lambda: nn.Sequential(nn.Linear(300, 200), nn.ReLU()), (50, 300), [2]),
    "small": (lambda: nn.Conv2d(16, 16, 3, padding=1), (1, 16, 9, 9), [1]),
    "groups": (lambda: nn.Conv2d(128, 128, 3, padding=1, groups=4), (1, 128, 9, 9), [1]),
    "transposed": (lambda: nn.ConvTranspose2d(64, 64, 4, 2, 1), (1, 64, 9, 9), [2]),
    "transposed and norm": (lambda: transposed_and_norm(72, 130, 4, 2, 1), (2, 72, 8, 9), [2]),
    "transposed, 3x3": (lambda: transposed_and_norm(72, 70, 3, 1, 1), (1, 72, 20, 19), [2]),
    "transposed, parts of the outputs": (lambda: transposed_and_norm(1024, 200, 4, 2, 1), (4, 1024, 4, 4), [4]),
    "transposed, phases as columns": (lambda: nn.ConvTranspose2d(64, 32, 2, 2), (1, 64, 9, 9), [1]),
    "transposed, groups": (lambda: nn.ConvTranspose2d(64, 64, 4, 2, 1, groups=2), (1, 64, 9, 9), [1]),
    "transposed, read where they lie": (lambda: transposed_and_norm(100, 70, 4, 1, 0), (3, 100, 1, 1), [1]),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_same_bits(name, threads):
    build, size, expected = MODELS[name]
    model = seeded(build)
    x = torch.randn(size, generator=torch.Generator().manual_seed(1))
    kept, low = fastcv.accelerate(model), fastcv.accelerate(model, low_memory=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            truth = low(x)  # the model's own: the first call compares
            torch.testing.assert_close(low(x), truth, rtol=1e-4, atol=1e-4)
            kept(x)
            assert torch.equal(low(x), kept(x))
            assert pieces(low, x) == (expected[threads] if isinstance(expected, dict) else expected)
            assert set(pieces(kept, x)) == {1}
    finally:
        torch.set_num_threads(before)


def test_bands_keep_their_weights():
    """A chain needs them for each band."""
    chain = seeded(lambda: nn.Sequential(nn.Conv2d(64, 300, 1), nn.MaxPool2d(2), nn.Conv2d(300, 80, 1)))
    low, x = fastcv.accelerate(chain, low_memory=True), torch.randn(1, 64, 90, 91)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            truth = low(x)
            torch.testing.assert_close(low(x), truth, rtol=1e-4, atol=1e-4)
            first, second, _ = pieces(low, x)
            assert first > 2 and second > 2
    finally:
        torch.set_num_threads(threads)


def test_other_sizes_and_other_weights():
    model = seeded(lambda: nn.Sequential(Block(72), nn.MaxPool2d(2), Block(72)))
    low = fastcv.accelerate(model, low_memory=True)
    with torch.inference_mode():
        for size in ((1, 72, 20, 21), (3, 72, 9, 8), (1, 72, 33, 40), (1, 72, 20, 21)):
            x = torch.randn(size)
            torch.testing.assert_close(low(x), model(x), rtol=1e-4, atol=1e-4)
    low.load_state_dict(seeded(lambda: nn.Sequential(Block(72), nn.MaxPool2d(2), Block(72))).state_dict())
    with torch.no_grad():
        low[0].first.weight.mul_(2)
    with torch.inference_mode():
        torch.testing.assert_close(low(x), model(x), rtol=1e-4, atol=1e-4)  # which shares its weights


def test_half_precision_products_and_precision():
    model, x = seeded(lambda: Block(200)), torch.randn(1, 200, 15, 14)
    for options in (dict(dtype=torch.bfloat16), dict(precision="highest"), dict(precision="fast")):
        kept, low = fastcv.accelerate(model, **options), fastcv.accelerate(model, low_memory=True, **options)
        with torch.inference_mode():
            kept(x), low(x)
            assert torch.equal(kept(x), low(x))


def test_wrong_argument():
    with pytest.raises(TypeError, match="low_memory: expected a bool, got 1"):
        fastcv.accelerate(nn.Conv2d(3, 3, 3), low_memory=1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_is_less():
    """Winograd's weights of these layers take 38 MB."""
    code = """
import torch, fastcv
from pathlib import Path
def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
layers = [torch.nn.Conv2d(256, 256, 3, padding=1) for _ in range(4)]
model = fastcv.accelerate(torch.nn.Sequential(*layers).eval(), low_memory=LOW)
x = torch.randn(1, 256, 14, 14)
with torch.inference_mode():
    for _ in range(3):
        model(x)
print(peak() // 1024)
"""
    peaks = []
    for low in ("True", "False"):
        command = [sys.executable, "-c", code.replace("LOW", low)]
        peaks.append(int(subprocess.run(command, capture_output=True, check=True).stdout))
    low, kept = peaks
    assert kept - low > 20
