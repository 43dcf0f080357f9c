"""Paint one picture in the style of another, by optimisation of its pixels.

    python examples/style_transfer.py --steps 200
    python examples/style_transfer.py --content photo.jpg --style painting.jpg --weights encoder.pth

Source: Gatys, Ecker and Bethge, "Image style transfer using convolutional neural networks", CVPR 2016. The features are
those of VGG-19 up to relu4_1, a quarter as wide: trained where ``--weights`` names a state dict (the encoder "4SE" of
Collaborative-Distillation fits), else random, which still carries textures (He, Wang and Hopcroft, "A powerful
generative model using random weights for the deep image representation", NeurIPS 2016).

The style loss and its gradient are one fused operator, :func:`fastcv.ops.style_loss`; the program times a step with it
and with torch's operators.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import fastcv
from fastcv._files import replacing

# VGG-19's first nine convolutions: name and channels; "pool" halves the map. Style is compared after conv?1.
LAYERS = (
    ("conv11", 16), ("conv12", 16), "pool",
    ("conv21", 32), ("conv22", 32), "pool",
    ("conv31", 64), ("conv32", 64), ("conv33", 64), ("conv34", 64), "pool",
    ("conv41", 128),
)  # fmt: skip
STYLE = ("conv11", "conv21", "conv31", "conv41")
CONTENT = "conv41"


class Encoder(nn.Module):
    """VGG-19 up to relu4_1; returns the features after every convolution that is asked for."""

    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 3, 1)  # normalises the colours, in trained weights
        nn.init.dirac_(self.conv0.weight)
        nn.init.zeros_(self.conv0.bias)
        channels = 3
        for layer in LAYERS:
            if layer != "pool":
                conv = fastcv.nn.Conv2d(channels, layer[1], 3)
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                nn.init.zeros_(conv.bias)
                self.add_module(layer[0], conv)
                channels = layer[1]
        self.requires_grad_(False)

    def load(self, file: Path) -> None:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("model", state)
        self.load_state_dict({name: value for name, value in state.items() if "aux" not in name})

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x, features = self.conv0(image), {}
        for layer in LAYERS:
            if layer == "pool":
                x = F.max_pool2d(x, 2)
            else:
                x = F.relu(getattr(self, layer[0])(F.pad(x, (1, 1, 1, 1), mode="reflect")))
                features[layer[0]] = x
        return features


def fused_style_loss(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    return fastcv.ops.style_loss(features, targets)


def plain_style_loss(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    """The same of torch's operators."""
    total = 0.0
    for f, target in zip(features, targets, strict=True):
        rows = f.flatten(2)
        gram = rows @ rows.mT / rows[0].numel()
        total = total + (gram - target).square().sum() / 4 / len(features)
    return total


def step_time(encoder: Encoder, image: Tensor, targets: list[Tensor], loss, rounds: int = 5) -> float:
    """Seconds of the style loss and its gradient with respect to the features, the median."""
    found = encoder(image.detach())
    features = [found[name].requires_grad_() for name in STYLE]
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        torch.autograd.grad(loss(features, targets), features)
        times.append(time.perf_counter() - start)
    return sorted(times)[rounds // 2]


def transfer(encoder: Encoder, content: Tensor, style: Tensor, steps: int, style_weight: float) -> Tensor:
    """The picture, ``[1, 3, H, W]``, from that of the content."""
    with torch.no_grad():
        aim = encoder(content)[CONTENT]
        painted = encoder(style)
        targets = [fastcv.ops.gram_matrix(painted[name]) for name in STYLE]
    image = content.clone(memory_format=torch.channels_last).requires_grad_()
    optimiser = torch.optim.Adam([image], lr=0.02)
    first = None
    for step in range(steps):
        optimiser.zero_grad()
        features = encoder(image)
        content_loss = F.mse_loss(features[CONTENT], aim) / aim.square().mean()
        style_loss = fused_style_loss([features[name] for name in STYLE], targets)
        first = first or float(style_loss.detach())
        (content_loss + style_weight * style_loss / first).backward()
        optimiser.step()
        with torch.no_grad():
            image.clamp_(0, 1)
        if step == 0 or (step + 1) % max(1, steps // 10) == 0:
            style_left = float(style_loss.detach()) / first
            print(
                f"step {step + 1:4d}: content {float(content_loss.detach()):.4f}, style {style_left:.4f} of the first"
            )
    plain, fused = (step_time(encoder, image, targets, loss) for loss in (plain_style_loss, fused_style_loss))
    print(f"style loss and gradient: torch {1e3 * plain:.1f} ms, fastcv {1e3 * fused:.1f} ms, {plain / fused:.1f}x")
    return image.detach()


def read(file: Path | None, default: str, size: int) -> Tensor:
    """``[1, 3, H, W]`` in 0..1, the longer side of ``size`` pixels."""
    if file is None:
        import skimage.data

        picture = Image.fromarray(getattr(skimage.data, default)())
    else:
        picture = Image.open(file).convert("RGB")
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255.0


def save(image: Tensor, file: Path) -> None:
    pixels = (image[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--content", type=Path, help="a photograph; default: scikit-image's astronaut")
    parser.add_argument("--style", type=Path, help="a painting; default: scikit-image's cup of coffee")
    parser.add_argument("--weights", type=Path, help="a state dict of the encoder; default: random features")
    parser.add_argument("--size", type=int, default=384, help="pixels of the longer side")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--style-weight", type=float, default=5.0, help="of the style loss, both counted from 1")
    parser.add_argument("--output", type=Path, default=Path("demo_output/style_transfer.png"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    encoder = Encoder().eval()
    if options.weights:
        encoder.load(options.weights)
    content, style = read(options.content, "astronaut", options.size), read(options.style, "coffee", options.size)
    start = time.perf_counter()
    image = transfer(encoder, content, style, options.steps, options.style_weight)
    print(f"{options.steps} steps in {time.perf_counter() - start:.1f} s")
    save(image, options.output)
    print(f"the picture is {options.output}")


if __name__ == "__main__":
    main()
