"""Chains of steps in bands of rows: the same numbers as step by step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastcv

if fastcv.build_info()["operators"]["conv2d"]["cpu"] != "compiled":
    pytest.skip("the compiled part is not built", allow_module_level=True)


@pytest.fixture(autouse=True)
def one_thread():
    """Maps from 2 MB on are cut for one thread, larger ones for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bands(fast, x):
    """Of each step of the only program."""
    part, *_ = fast.fastcv_report.parts
    program, *_ = part.programs
    return program.profile(x, repeat=1)[:, 22].tolist()


def chain(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers).eval()


CHAINS = {
    "separable": (
        chain(nn.Conv2d(8, 64, 1), nn.Conv2d(64, 64, 3, 1, 1, groups=64), nn.Conv2d(64, 8, 1)),
        (1, 8, 97, 91),
    ),
    "stride": (
        chain(nn.Conv2d(8, 64, 1), nn.ReLU6(), nn.Conv2d(64, 64, 5, 2, 2, groups=64), nn.Conv2d(64, 8, 1, 2)),
        (1, 8, 133, 90),
    ),
    "pixels_left_over": (chain(nn.Conv2d(8, 64, 1), nn.Conv2d(64, 16, 1, 3)), (1, 8, 101, 101)),
    "dilation": (
        chain(nn.Conv2d(8, 64, 1), nn.Conv2d(64, 64, 3, 1, 4, 4, groups=64), nn.Conv2d(64, 24, 1)),
        (1, 8, 95, 97),
    ),
    "unpadded": (chain(nn.Conv2d(8, 64, 1), nn.Conv2d(64, 64, (5, 3), groups=64)), (1, 8, 97, 101)),
    "grouped": (chain(nn.Conv2d(8, 64, 1), nn.Conv2d(64, 64, 3, 2, 1, groups=16), nn.SiLU()), (1, 8, 97, 101)),
    "stem": (chain(nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)), (1, 3, 219, 230)),
    "ceil_mode": (chain(nn.Conv2d(3, 64, 7, 2, 3), nn.MaxPool2d(3, 2, ceil_mode=True)), (1, 3, 221, 218)),
    "averages": (chain(nn.Conv2d(8, 64, 1), nn.AvgPool2d(2), nn.Conv2d(64, 8, 1)), (1, 8, 99, 95)),
    "padded_average": (chain(nn.Conv2d(8, 64, 1), nn.AvgPool2d(3, 2, (0, 1), ceil_mode=True)), (1, 8, 98, 95)),
    "images": (chain(nn.Conv2d(8, 64, 1), nn.Conv2d(64, 64, 3, 1, 1, groups=64), nn.Conv2d(64, 8, 1)), (3, 8, 90, 91)),
    "small_images": (chain(nn.Conv2d(8, 64, 1), nn.MaxPool2d(2), nn.Conv2d(64, 8, 1)), (70, 8, 15, 13)),
    "last_convolution_is_large": (chain(nn.Conv2d(8, 64, 1), nn.Conv2d(64, 40, 3, 2, 1)), (2, 8, 97, 91)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_as_step_by_step(name):
    """With so many threads no map is cut; the same kernels give the same bits."""
    model, size = CHAINS[name]
    fast, x = fastcv.accelerate(model), torch.randn(size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = fast(x)  # the model's own: the first call compares
        result = fast(x)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        first, second, *_ = bands(fast, x)
        assert first > 1 and second > 1
        torch.set_num_threads(64)
        try:
            whole = fast(x)
            assert set(bands(fast, x)) == {1}
        finally:
            torch.set_num_threads(1)
        assert torch.equal(result, whole)


class Inverted(nn.Module):
    """MobileNetV2's block twice, the residual of which is read by a step before the one that may overwrite it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, 2, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 64, 3, 1, 1, groups=16 if i else 1),
                nn.ReLU(),
                nn.Conv2d(64, 64, 3, 1, 1, groups=64),
                nn.Conv2d(64, 16, 1),
            )
            for i in range(2)
        )

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class Branches(nn.Module):
    """The value between two steps of a chain is read again after it, and returned."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.third = nn.Conv2d(8, 64, 1), nn.Conv2d(64, 64, 1)
        self.second = nn.Conv2d(64, 64, 3, 1, 1, groups=64)

    def forward(self, x):
        a = self.first(x)
        b = self.third(self.second(a)) + a
        return a, b, torch.cat([F.relu(b), a], 1)


@pytest.mark.parametrize(("model", "channels"), [(Inverted(), 3), (Branches(), 8)], ids=["residual", "branches"])
@pytest.mark.parametrize("size", [(1, 190, 204), (2, 201, 187)])
def test_values_with_other_readers(model, channels, size):
    fast, x = fastcv.accelerate(model.eval()), torch.randn(size[0], channels, *size[1:])
    with torch.inference_mode():
        expected = model(x)
        for _ in range(2):
            torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=2e-5)
        assert max(bands(fast, x)) > 1


def test_threads_share_bands():
    """A map of 2 MB for each of so many threads."""
    model = chain(nn.Conv2d(8, 96, 1), nn.Conv2d(96, 96, 3, 2, 1, groups=96), nn.Conv2d(96, 8, 1))
    fast, x = fastcv.accelerate(model), torch.randn(1, 8, 240, 250)
    torch.set_num_threads(3)
    try:
        with torch.inference_mode():
            expected = model(x)
            for _ in range(5):
                torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)
            assert max(bands(fast, x)) > 1
    finally:
        torch.set_num_threads(1)
