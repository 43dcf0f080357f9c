"""A network of SegNet's form, with torch's int64 pooling indices and with fastcv's compact ones.

    python examples/segnet_indices.py --size 480 360

Source: Badrinarayanan, Kendall and Cipolla, "SegNet: a deep convolutional encoder-decoder architecture for image
segmentation", TPAMI 2017. The encoder remembers where each maximum was, and the decoder puts values back there. torch
keeps eight bytes for each maximum, twice the size of the pooled map itself; fastcv one. Weights are random: the program
compares time, memory and results, on a photograph.
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcv

# Channels of each stage and convolutions in it, as in VGG-16.
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def convolutions(channels: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)


class SegNet(nn.Module):
    """``[N, 3, H, W]`` to scores ``[N, classes, H, W]``; H and W are multiples of 32.

    ``compact`` has fastcv pool and unpool, with indices of one byte.
    """

    def __init__(self, classes: int, compact: bool):
        super().__init__()
        encoder, decoder, before = [], [], 3
        for channels, count in STAGES:
            encoder.append(convolutions([before] + [channels] * count))
            decoder.insert(0, convolutions([channels] * count + [before if before > 3 else channels]))
            before = channels
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
        self.scores = nn.Conv2d(STAGES[0][0], classes, 3, padding=1)
        self.compact = compact

    def pool(self, x: Tensor):
        if self.compact:
            return fastcv.ops.max_pool2d(x, 2, return_indices=True, indices="compact")
        return F.max_pool2d(x, 2, return_indices=True)

    def unpool(self, x: Tensor, indices) -> Tensor:
        return fastcv.ops.max_unpool2d(x, indices) if self.compact else F.max_unpool2d(x, indices, 2)

    def index_bytes(self, x: Tensor) -> int:
        count = 0
        for stage in self.encoder:
            x, indices = self.pool(stage(x))
            count += (indices.positions if self.compact else indices).nbytes
        return count

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for stage in self.encoder:
            x, indices = self.pool(stage(x))
            kept.append(indices)
        for stage in self.decoder:
            x = stage(self.unpool(x, kept.pop()))
        return self.scores(x)


class Pooling(nn.Module):
    """What of SegNet is not convolution: pooling and unpooling of its five maps."""

    def __init__(self, network: SegNet):
        super().__init__()
        self.network = network

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.network.unpool(*self.network.pool(x)) for x in maps]


def interleaved(ways: dict[str, nn.Module], argument, rounds: int) -> dict[str, float]:
    """Milliseconds of each way, by turns, the median."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way(argument)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: sorted(t[1:])[rounds // 2] for name, t in times.items()}


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(480, 352), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--classes", type=int, default=11)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    width, height = options.size
    if width % 32 or height % 32:
        parser.error(f"--size: expected multiples of 32, got {width} x {height}")
    import skimage.data

    photograph = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)[None] / 255.0
    image = F.interpolate(photograph, size=(height, width), mode="area").contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    plain = SegNet(options.classes, compact=False).eval().to(memory_format=torch.channels_last)
    compact = SegNet(options.classes, compact=True).eval().to(memory_format=torch.channels_last)
    compact.load_state_dict(plain.state_dict())
    torch.testing.assert_close(compact(image), plain(image), rtol=1e-4, atol=1e-5)
    sizes = [f"{network.index_bytes(image) / 2**20:.1f} MB" for network in (plain, compact)]
    print(f"SegNet, {width} x {height}: the same scores; {sizes[0]} of int64 indices, {sizes[1]} of compact ones")

    maps = []
    x = image
    for stage in plain.encoder:
        maps.append(stage(x))
        x = F.max_pool2d(maps[-1], 2)
    ways = {"torch, int64": plain, "fastcv, compact": compact}
    accelerated = {**ways, "fastcv.accelerate": fastcv.accelerate(plain)}
    for what, times in (
        ("pooling and unpooling", interleaved({name: Pooling(n) for name, n in ways.items()}, maps, options.rounds)),
        ("the whole network", interleaved(accelerated, image, options.rounds)),
    ):
        first = next(iter(times.values()))
        print(what + ": " + ", ".join(f"{name} {t:.1f} ms ({first / t:.1f}x)" for name, t in times.items()))


if __name__ == "__main__":
    main()
