"""Maps in bfloat16 between kernels that round their operands to it, where ``accelerate`` may: csrc/program/packed.cpp.

The kernel is that of the processor's tiles, which is emulated where there are none."""

import pytest
import torch
import torch.nn.functional as F
from program_cases import programs
from torch import nn

import fastcv
from fastcv import ops
from fastcv.accelerate._tune import _shapes
from fastcv.ops.conv2d import KERNELS

if fastcv.build_info()["operators"]["conv2d"]["cpu"] != "compiled":
    pytest.skip("the compiled part is not built", allow_module_level=True)


class Network(nn.Module):
    """Every kind of step that reads or writes packed maps, between some that do not."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 40, 3, padding=1)
        self.groups = nn.Conv2d(40, 36, 3, stride=2, padding=1, groups=2)
        self.dilated = nn.Conv2d(36, 72, 3, padding=(2, 4), dilation=(2, 4))
        self.shortcut = nn.Conv2d(40, 72, 1, stride=2, bias=False)
        self.lateral, self.top = nn.Conv2d(40, 32, 1), nn.Conv2d(72, 32, 1)
        self.odd = nn.Conv2d(32, 33, 1)
        self.last = nn.Conv2d(32, 6, 3)

    def forward(self, x):
        a = self.packed(F.relu(self.conv(self.first, x)))
        b = self.packed(F.relu(self.conv(self.groups, a)))
        shortcut = self.packed(self.conv(self.shortcut, a))
        c = self.packed(F.relu(self.conv(self.dilated, b) + shortcut))
        lateral, top = self.packed(self.conv(self.lateral, a)), self.packed(self.conv(self.top, c))
        merged = self.packed(lateral + F.interpolate(top, size=lateral.shape[-2:], mode="nearest"))
        return self.conv(self.last, merged), F.max_pool2d(self.conv(self.odd, merged), 2)

    def conv(self, layer, x):
        return layer(x)

    def packed(self, x):
        return x


class Expected(Network):
    """The same by one operator after the other, in float32 but for what is packed."""

    def conv(self, layer, x):
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return ops.conv2d(x, layer.weight, layer.bias, *geometry, kernel="amx")

    def packed(self, x):
        return x.bfloat16().float()


@pytest.fixture
def accelerate():
    """``fastcv.accelerate`` in bfloat16, with the kernel of the tiles for the convolutions of such an input."""
    chosen = []

    def accelerated(model, x):
        fast = fastcv.accelerate(model, dtype=torch.bfloat16)
        fast(x)
        for c in _shapes(fast, (x,), programs(fast)):
            shape = (c["input"], c["weight"], c["groups"], c["stride"], c["padding"], c["dilation"])
            torch.ops.fastcv.conv2d_choose(*shape, "amx")
            chosen.append(shape)
        for program in programs(fast):
            program.reload()
        return fast

    yield accelerated
    for shape in chosen:
        torch.ops.fastcv.conv2d_choose(*shape, "auto")


@pytest.mark.parametrize("size", [(1, 20, 34), (2, 37, 21), (3, 5, 6)])
def test_packed_maps_lose_what_operands_would(accelerate, size):
    torch.manual_seed(0)
    model, expected = Network().eval(), Expected().eval()
    expected.load_state_dict(model.state_dict())
    x = torch.randn(size[0], 4, *size[1:])
    with torch.inference_mode():
        fast, wanted = accelerate(model, x), expected(x)
        for _ in range(2):
            for result, other in zip(fast(x), wanted, strict=True):
                torch.testing.assert_close(result, other, rtol=0, atol=0)
        rows = [row for program in programs(fast) for row in program.profile(x).tolist()]
    assert [KERNELS[row[1]] for row in rows if row[1] >= 0] == ["amx"] * 8
    bytes_of = {tuple(row[6:10]) + tuple(row[11:13]): row[4] for row in rows}
    n, h, w = size[0], (size[1] + 1) // 2, (size[2] + 1) // 2
    weights = 72 * 36 * 9
    assert bytes_of[36, h, w, 72, w, 3] == 2 * n * h * w * (36 + 72 + 72) + 4 * weights


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.ReLU6()])
def test_activations_of_packed_maps(accelerate, activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 36, 3), activation, nn.Conv2d(36, 24, 1), activation, nn.Conv2d(24, 7, 3)).eval()
    x = torch.randn(2, 8, 19, 23)
    with torch.inference_mode():
        result, expected = accelerate(model, x)(x), model(x)
    assert (result - expected).abs().max() <= 0.02 * expected.abs().max()
