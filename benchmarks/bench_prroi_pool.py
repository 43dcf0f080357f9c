"""prroi_pool, forward and with gradients of map and boxes, against its formula in torch, as no package has it."""

import torch

import fastcv
from benchmarks.harness import Case, as_test, backward, forward


def _inputs(k: int, channels: int, size: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, size, size, generator=generator)
    corner = torch.rand(k, 2, generator=generator) * (size - 24)
    boxes = torch.cat([corner, corner + 4 + 18 * torch.rand(k, 2, generator=generator)], 1)
    return x, boxes


def _weights(low, high, size, bins):
    """[K, bins, size]: means of the hats of pixels over bins, by their antiderivative."""
    edges = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, bins + 1, device=low.device)
    t = (edges[..., None] - torch.arange(size, device=low.device)).clamp(-1, 1)
    primitive = torch.where(t < 0, (t + 1) ** 2 / 2, 1 - (1 - t) ** 2 / 2)
    return (primitive[:, 1:] - primitive[:, :-1]) * (bins / (high - low))[:, None, None]


def _in_torch(x, boxes, bins):
    rows = _weights(boxes[:, 1], boxes[:, 3], x.shape[2], bins)
    columns = _weights(boxes[:, 0], boxes[:, 2], x.shape[3], bins)
    return torch.einsum("kph,chw,kqw->kcpq", rows, x[0], columns)


def _case(k, channels, size, bins, differentiate):
    what = f"{k} regions of {channels}x{size}x{size} to {bins}x{bins}"
    measure = backward if differentiate else forward
    contenders = {
        "fastcv": measure(lambda x, boxes: fastcv.ops.prroi_pool(x, [boxes], bins)),
        "torch": measure(lambda x, boxes: _in_torch(x, boxes, bins)),
    }

    def inputs():
        return tuple(t.requires_grad_(differentiate) for t in _inputs(k, channels, size))

    what = f"{what}, gradients" if differentiate else what
    return Case("prroi_pool", what, inputs, contenders, tolerance=1e-3)


CASES = [_case(k, 256, 64, 7, differentiate) for k in (50, 500) for differentiate in (False, True)]

test_prroi_pool = as_test(CASES)
