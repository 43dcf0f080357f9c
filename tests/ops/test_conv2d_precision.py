"""Rounding errors of conv2d's kernels: over the convolutions of torchvision's models, and for bad scaling.

For an output o = sum x w of a kernel without Winograd, |error| <= c sum |x| |w|, whatever the data are (c grows with
the depth of the sum if its first terms are the largest). Winograd's kernels mix the pixels of a tile and the elements
of a filter. There, with the maximum over the input pixels of the output's tile,

    |error| <= c S,   S = sum over channels of (max |x|) (sum of |w| over the filter's elements)

so that any scales of channels, outputs and distant pixels are harmless, and an outlier disturbs the outputs of
its tiles. A bound against sum |x| |w| of the output alone cannot hold: it may be zero where S is not.

The form of these bounds follows from the arithmetic; the numbers c in _tolerance are about twice the largest errors
seen in the cases here, not proven. Filters of one element and outliers are the worst. Relative to the largest output,
the largest seen of torchvision's convolutions, with few outputs, are 2.3e-6 by default, 1.5e-5 for "fast", and 4.3e-6
without Winograd (sums of 18432 terms; most below 2e-6).
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conv_cases import ON_TRITON, cpu_only

import fastcv
from fastcv._library import implementation

pytestmark = pytest.mark.skipif(
    implementation("conv2d", "cpu") != "compiled",
    reason="of the compiled kernels; the reference is torch's convolution",
)

# Pixels and filter elements of Winograd's tiles along an axis; of smaller filters the sum is the same.
TILES = {
    "winograd": (4, 3),
    "winograd_2x2": (2, 3),
    "winograd_3x3": (3, 3),
    "winograd_6x6": (6, 3),
    "winograd_5x5": (2, 5),
    "winograd_5x5_4x4": (4, 5),
}
FAST = ("winograd_6x6", "winograd_5x5_4x4")


# Every convolution of torchvision's models for classification, segmentation and detection, at usual sizes: channels,
# outputs, kernel, stride, padding, dilation, groups (two numbers where the axes differ), sizes of the input.
def _shapes():
    def two(word):
        numbers = [int(n) for n in word.split("x")]
        return tuple(numbers * 2 if len(numbers) == 1 else numbers)

    for line in (Path(__file__).parent / "conv2d_shapes.txt").read_text().splitlines():
        c, k, kernel, stride, padding, dilation, groups, *sizes = line.split()
        yield int(c), int(k), *map(two, (kernel, stride, padding, dilation)), int(groups), [two(s) for s in sizes]


def _kernels(weight, stride, dilation, groups):
    """Of each precision: by name where Winograd's may be chosen, as that depends on the size."""
    kernel = tuple(weight.shape[2:])
    if stride != (1, 1) or groups > 1 or ON_TRITON:
        return ("auto",)
    if max(kernel) <= 3 and kernel not in ((1, 1), (3, 3)) and dilation == (1, 1) and min(weight.shape[:2]) >= 32:
        return ("gemm", "winograd", "winograd_2x2", "winograd_3x3")
    winograd = [name for name, (_, r) in TILES.items() if kernel == (r, r)]
    return ("gemm", *winograd) if winograd else ("auto",)


def _tolerance(kernel):
    """Of |error|: relative to the largest output, and to sum |x| |w| or Winograd's S."""
    if kernel in FAST:
        return 5e-5, 1e-5
    return (1e-5, 3e-6) if kernel in TILES else (6e-6, 5e-6)


def _tile(kernel, weight):
    """Its pixels of the input and of the output, for each axis."""
    patch = sum(TILES[kernel]) - 1
    patches = [patch if r > 1 else 1 for r in weight.shape[2:]]
    return patches, [p + 1 - r for p, r in zip(patches, weight.shape[2:], strict=True)]


def _tile_sums(x, weight, padding, patches, pixels):
    """S of each tile, [1, K, tiles, tiles]."""
    sizes = [n + 2 * q - r + 1 for n, q, r in zip(x.shape[2:], padding, weight.shape[2:], strict=True)]
    more = [-(-n // m) * m - n for n, m in zip(sizes, pixels, strict=True)]
    padded = F.pad(x.abs().double(), (padding[1], padding[1] + more[1], padding[0], padding[0] + more[0]))
    return F.conv2d(F.max_pool2d(padded, patches, pixels), weight.abs().double().sum((2, 3), keepdim=True))


def _exact(x, weight, *geometry):
    return F.conv2d(x.double(), weight.double(), None, *geometry)


def _measure(x, weight, expected, kernel, stride, padding, dilation, groups):
    """The largest error, relative to the largest output, and relative to sum |x| |w| or S."""
    rest = (None, stride, padding, dilation, groups)
    difference = (fastcv.ops.conv2d(x, weight, *rest, kernel=kernel) - expected).abs()
    assert difference.isfinite().all()
    relative = (difference.max() / expected.abs().max()).item()
    if kernel in TILES and dilation == (1, 1):
        patches, pixels = _tile(kernel, weight)
        sums = _tile_sums(x, weight, padding, patches, pixels)
        difference = F.max_pool2d(difference, pixels, pixels, ceil_mode=True)
    elif kernel in TILES:
        return relative, 0.0  # its tiles are taken from phases
    else:
        sums = _exact(x.abs(), weight.abs(), *rest[1:])
    return relative, (difference / sums.clamp(min=1e-300)).max().item()


def _failures(shapes, most_outputs, most_pixels, most_groups):
    for c, k, size, stride, padding, dilation, groups, sizes in shapes:
        some = min(groups, most_groups)  # groups are alike
        outputs = most_outputs if max(size) == min(size) else max(most_outputs, 32)  # Winograd's least for 1x3
        c, k = c // groups * some, min(k, outputs) if groups == 1 else k // groups * some
        if most_pixels < 32:  # dilated as far: phases are alike too
            padding = tuple(p if d == 1 else p * min(d, 3) // d for p, d in zip(padding, dilation, strict=True))
            dilation = tuple(min(d, 3) for d in dilation)
        reach = [d * (n - 1) + 1 for d, n in zip(dilation, size, strict=True)]
        h, w = (min(n, max(most_pixels, r + s)) for n, r, s in zip(sizes[-1], reach, stride, strict=True))
        generator = torch.Generator().manual_seed(c + 7 * k + h)
        x = torch.randn(1, c, h, w, generator=generator).relu_()
        weight = torch.randn(k, c // some, *size, generator=generator)
        expected = _exact(x, weight, stride, padding, dilation, some)
        for kernel in _kernels(weight, stride, dilation, some):
            errors = _measure(x, weight, expected, kernel, stride, padding, dilation, some)
            if any(e > t for e, t in zip(errors, _tolerance(kernel), strict=True)):
                yield (*x.shape, *weight.shape, stride, padding, dilation), kernel, errors


def _sample(shapes):
    """Of each kernel, stride and dilation the deepest, where errors are largest, and one of four others; of those
    without neighbours, which are many and whose depth alone matters, one of sixteen."""
    families = {}
    for shape in shapes:
        channels, _, kernel, stride, _, dilation, groups, _ = shape
        families.setdefault((kernel, stride, dilation, groups > 1), []).append((channels // groups, shape))
    for (kernel, *_), members in families.items():
        yield from (shape for _, shape in sorted(members)[:: -16 if kernel == (1, 1) else -4])


def test_convolutions_of_torchvision():
    shapes = list(_shapes())
    assert len(shapes) > 1000
    some = list(_sample(shapes))
    assert len(some) > 150 and max(c // g for c, *_, g, _ in shapes) == max(c // g for c, *_, g, _ in some)
    assert list(_failures(some, 16, 14, 2)) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(40))
def test_every_convolution_of_torchvision(part):
    assert list(_failures(list(_shapes())[part::40], 64, 40, 16)) == []


CASES = [("gemm", 3), ("gemm", 5), *((name, r) for name, (_, r) in TILES.items())]
if ON_TRITON:
    CASES = [("auto", 3)]


def _data(channels, size, outputs=24):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(1, channels, 21, 26, generator=generator)
    return x, torch.randn(outputs, channels, size, size, generator=generator), generator


def _same(x, weight, kernel):
    geometry = (1, 1), (weight.shape[2] // 2,) * 2, (1, 1), 1
    return _measure(x, weight, _exact(x, weight, *geometry), kernel, *geometry)


@pytest.mark.parametrize(("kernel", "size"), CASES)
@pytest.mark.parametrize("scales", [(1e-6, 1.0), (1.0, 1e-6), (1e6, 1.0), (1.0, 1e6), (1e-6, 1e-6), (1e6, 1e6)])
def test_uniform_scales(kernel, size, scales):
    x, weight, _ = _data(40, size)
    errors = _same(x * scales[0], weight * scales[1], kernel)
    assert all(e < t for e, t in zip(errors, _tolerance(kernel), strict=True)), errors


@pytest.mark.parametrize(("kernel", "size"), CASES)
@pytest.mark.parametrize(
    "data", ["input channels", "both", "outputs", "outliers", "offset", "impulse", "filter of one"]
)
def test_mixed_scales(kernel, size, data):
    """Against S, or sum |x| |w|; the largest output may be made of a channel alone."""
    x, weight, generator = _data(40, size)
    scale = 10 ** (12 * torch.rand(40, generator=generator) - 6)
    if data == "input channels":
        x = x * scale[:, None, None]
    elif data == "both":  # each channel counts alike
        x, weight = x * scale[:, None, None], weight / scale[:, None, None]
    elif data == "outputs":
        weight = weight * scale[:24, None, None, None]
    elif data == "outliers":
        x[torch.rand(x.shape, generator=generator) < 0.003] *= 1e6
    elif data == "offset":
        x = x + 1e4
    elif data == "impulse":
        x = torch.zeros_like(x)
        x[:, :, 9, 11] = 1e6
    else:
        kept = weight[:, :, 0, 0].clone()
        weight.zero_()[:, :, 0, 0] = kept
    assert _same(x, weight, kernel)[1] < _tolerance(kernel)[1]


@cpu_only
@pytest.mark.parametrize("kernel", TILES)
def test_errors_stay_in_their_tile(kernel):
    """An outlier's rounding errors do not reach the pixels of other tiles."""
    m, r = TILES[kernel]
    x, weight, _ = _data(8, r)
    far = x.clone()
    far[:, :, 0, 0] = 1e8
    a, b = (fastcv.ops.conv2d(i, weight, padding=r // 2, kernel=kernel) for i in (x, far))
    end = (r // 2 // m + 1) * m  # of the tiles whose windows hold it
    assert torch.equal(a[:, :, end:], b[:, :, end:]) and torch.equal(a[..., end:], b[..., end:])
    assert not torch.equal(a, b)
