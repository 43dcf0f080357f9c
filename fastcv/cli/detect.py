"""``fastcv detect``: objects in an image file, by a model of torchvision with COCO weights."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from .. import interop
from .._files import replacing


def add_parser(commands) -> argparse.ArgumentParser:
    text = "detect objects in an image with a model of torchvision and its COCO weights"
    parser = commands.add_parser("detect", help=text, description=text.capitalize() + ".")
    parser.add_argument("image", type=Path, help="an image file")
    parser.add_argument("--model", default="fasterrcnn_resnet50_fpn", help="default: %(default)s")
    parser.add_argument("--score", type=float, default=0.5, help="least score, default: %(default)s")
    parser.add_argument("--output", type=Path, help="default: IMAGE_detections.png here")
    return parser


def load_model(name: str):
    """The model in evaluation mode, and the names of its classes.

    Raises:
        SystemExit: with a message that names what is missing.
    """
    try:
        from torchvision.models import detection, get_model, get_model_weights, list_models
    except ImportError:
        raise SystemExit("fastcv detect needs torchvision: pip install torchvision") from None
    known = list_models(module=detection)
    if name not in known:
        raise SystemExit(f"--model: expected one of {', '.join(known)}, got {name}")
    weights = get_model_weights(name).DEFAULT
    try:
        model = get_model(name, weights=weights)
    except OSError as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
        raise SystemExit(
            f"the weights of {name} are neither cached nor downloadable ({error}): download\n"
            f"  {weights.url}\nwhere there is a network, and put the file at\n  {file}"
        ) from None
    return model.eval(), weights.meta["categories"]


def read_image(path: Path) -> torch.Tensor:
    """uint8 ``[3, H, W]``."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except OSError as error:
        raise SystemExit(f"image: cannot read {path}: {error}") from None


def save_boxes(path: Path, image: torch.Tensor, boxes: torch.Tensor, labels: list[str]) -> None:
    """Draws boxes ``[K, 4]`` on a uint8 image ``[3, H, W]``."""
    from PIL import Image
    from torchvision.utils import draw_bounding_boxes

    drawn = draw_bounding_boxes(image, boxes, labels, colors="red", width=3) if labels else image
    with replacing(path) as temporary:
        Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(temporary)


def main(arguments: argparse.Namespace) -> int:
    image = read_image(arguments.image)
    model, names = load_model(arguments.model)
    with interop.patched("torchvision"), torch.inference_mode():
        start = time.perf_counter()
        (found,) = model([image.float() / 255])
        seconds = time.perf_counter() - start
    sure = found["scores"] >= arguments.score
    boxes, scores = found["boxes"][sure], found["scores"][sure].tolist()
    labels = [
        f"{names[label]} {score:.2f}" for label, score in zip(found["labels"][sure].tolist(), scores, strict=True)
    ]
    output = arguments.output or Path(f"{arguments.image.stem}_detections.png")
    save_boxes(output, image, boxes, labels)
    for label, box in zip(labels, boxes.round().int().tolist(), strict=True):
        print(f"{label}  {box}")
    print(f"{len(labels)} objects in {seconds:.2f} s, drawn in {output}", file=sys.stderr)
    return 0
