"""What the tests of programs share: models, and how results are compared."""

import torch
import torch.nn.functional as F
from torch import nn

import fastcv
from fastcv.accelerate import _graphs
from fastcv.accelerate._graphs import Recorded


class Function(nn.Module):
    """A function after a convolution, and one before another, so that it lies inside a program."""

    def __init__(self, function, channels=12, out=12):
        super().__init__()
        self.first = nn.Conv2d(channels, 12, 1)
        self.last = nn.Conv2d(out, 5, 1) if out else nn.Identity()
        self.function = function
        if isinstance(function, nn.Module):
            self.layer = function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


class Skip(nn.Sequential):
    def forward(self, x):
        return F.relu(x + super().forward(x))


class Block(nn.Module):
    """As in ConvNeXt."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.wide, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)
        y = self.scale * y
        y += x
        return y


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 12, 3, 2, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return F.conv_transpose2d(x, self.weight, None, 2, padding=1, dilation=(2, 1))


STEPS = {
    "transposed": nn.ConvTranspose2d(12, 12, 2, 2),
    "transposed_norm": nn.Sequential(
        nn.ConvTranspose2d(12, 12, (4, 3), 2, 1, (0, 1), 1, False), nn.BatchNorm2d(12), nn.ReLU()
    ),
    "transposed_groups": nn.Sequential(
        nn.ConvTranspose2d(12, 40, 3, 1, 1), nn.ConvTranspose2d(40, 32, 4, 2, 1, groups=2), nn.Conv2d(32, 12, 1)
    ),
    "transposed_depthwise": nn.Sequential(nn.ConvTranspose2d(12, 12, 4, 2, 1, groups=12), nn.BatchNorm2d(12)),
    "transposed_winograd": nn.Sequential(
        nn.ConvTranspose2d(12, 40, 4, 2, 1), nn.ConvTranspose2d(40, 40, 4, 2, 1), nn.SiLU(), nn.Conv2d(40, 12, 1)
    ),
    "transposed_add": nn.Sequential(
        Skip(nn.ConvTranspose2d(12, 12, 3, 1, 1)), Skip(nn.ConvTranspose2d(12, 12, 5, 1, 2))
    ),
    "transposed_function": Functional(),
    "max_pool": nn.MaxPool2d(3, 2, 1),
    "max_pool_ceil": nn.MaxPool2d(2, 2, ceil_mode=True),
    "max_pool_dilated": nn.MaxPool2d((3, 2), (1, 2), (1, 0), dilation=2),
    "max_pool_function": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "max_pool_large": nn.MaxPool2d(9, 1, 4),
    "avg_pool": nn.AvgPool2d(3, 2, 1),
    "avg_pool_exclusive": nn.AvgPool2d(3, 2, 1, count_include_pad=False, ceil_mode=True),
    "avg_pool_function": lambda x: F.avg_pool2d(x, kernel_size=3, stride=1, padding=1),
    "adaptive": nn.AdaptiveAvgPool2d((3, 4)),
    "adaptive_larger": nn.AdaptiveAvgPool2d((30, None)),
    "adaptive_function": lambda x: F.adaptive_avg_pool2d(x, 1),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "add": lambda x: x + x.sigmoid(),
    "mul": lambda x: x * x.sigmoid(),
    "gate": lambda x: F.adaptive_avg_pool2d(x, 1).sigmoid() * x,
    "gate_add": lambda x: x + F.adaptive_avg_pool2d(x, 1),
    "cat": lambda x: torch.cat([x, x.relu()], 1)[:, :12],
    "cat_twice": lambda x: torch.cat([x, F.relu(x), x], 1).chunk(3, 1)[1],
    "cat_prefixes": lambda x: torch.cat([x, F.silu(x)], 1).relu().chunk(2, 1)[0]
    + torch.cat([x, F.silu(x), x * x], 1).chunk(3, 1)[2],
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "nearest_size": lambda x: F.interpolate(x, size=(7, 31)),
    "bilinear": lambda x: F.interpolate(x, scale_factor=(1.5, 0.7), mode="bilinear"),
    "bilinear_corners": nn.Upsample((20, 9), mode="bilinear", align_corners=True),
    "like": lambda x: F.interpolate(F.max_pool2d(x, 2), size=x.shape[-2:], mode="bilinear") + x,
    "activations": lambda x: F.gelu(F.hardswish(F.leaky_relu(x, 0.3))),
    "tanh": lambda x: torch.tanh(x * x.tanh()),
    "norm": nn.Sequential(nn.BatchNorm2d(12), nn.ReLU()),
    "written_in_place": lambda x: x.relu_() + x,
}  # fmt: skip


class Unpooled(nn.Module):
    """As in SegNet: an encoder's pooling, undone in the decoder."""

    def __init__(self, channels=24, kernel=2, output_size=None, **options):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(5, channels, 3, padding=1), nn.Conv2d(channels, channels, 1), nn.Tanh()
        self.pool = fastcv.nn.MaxPool2d(kernel, return_indices=True, **options)
        self.unpool, self.d = nn.MaxUnpool2d(kernel), nn.Conv2d(channels, 4, 1)
        if "indices" in options:
            self.unpool = fastcv.nn.MaxUnpool2d(kernel)
        self.output_size = output_size

    def forward(self, x):
        y = F.relu(self.a(x))
        size = y.size() if self.output_size == "like" else self.output_size
        pooled, indices = self.pool(y)
        return self.d(self.unpool(self.c(self.b(pooled)), indices, output_size=size))


UNPOOLINGS = [
    ({}, [(16, 20), (12, 8)]),
    ({"channels": 7}, [(16, 20), (12, 8)]),
    ({"kernel": (2, 3), "output_size": "like"}, [(17, 23), (16, 24), (4, 3)]),
    ({"kernel": 3, "output_size": "like", "ceil_mode": True}, [(17, 23), (9, 9)]),
    ({"output_size": (16, 21)}, [(16, 21)]),
    ({"indices": "compact"}, [(17, 23), (8, 8)]),
]


class Pyramid(nn.Module):
    """Maps of two sizes, and the smaller one resized and added."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3, stride=2)
        self.lateral, self.top, self.last = nn.Conv2d(12, 10, 1), nn.Conv2d(16, 10, 1), nn.Conv2d(10, 5, 3)

    def forward(self, x):
        x = self.stem(x)
        lateral, top = self.lateral(x), self.top(self.down(x))
        return self.last(lateral + F.interpolate(top, size=lateral.shape[-2:], mode="nearest"))


def generator():
    """As in DCGAN: of vectors."""
    layers = []
    for c, k, stride, padding in ((20, 48, 1, 0), (48, 32, 2, 1)):
        layers += [nn.ConvTranspose2d(c, k, 4, stride, padding, bias=False), nn.BatchNorm2d(k), nn.ReLU(True)]
    return randomise_norms(nn.Sequential(*layers, nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Sigmoid()).eval())


def assert_alike(fast, model, *inputs, tolerance=2e-5):
    """Twice each: the first call with a size plans for it."""
    with torch.inference_mode():
        for x in inputs:
            for _ in range(2):
                torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=tolerance)


def randomise_norms(model):
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return model


def programs(fast):
    return [p for part in fast.fastcv_report.parts for p in part.programs]


def without_gpu(monkeypatch):
    """Graphs of functions on the CPU, which compute over static memory; gives the shapes of what is recorded."""
    made = []

    def record(function, tensors, pool):
        inputs = tuple(torch.empty_like(t) for t in tensors)
        outputs = tuple(function(*tensors))
        made.append([tuple(t.shape) for t in tensors])

        def replay():
            for static, result in zip(outputs, function(*inputs), strict=True):
                static.copy_(result)

        return Recorded(inputs, outputs, replay)

    monkeypatch.setattr(_graphs, "_record", record)
    monkeypatch.setattr(_graphs, "_applies", lambda tensors: not torch.is_grad_enabled())
    return made
