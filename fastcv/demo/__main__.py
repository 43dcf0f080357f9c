"""``python -m fastcv.demo``: prints what the patch and accelerate change, and draws the faces that were found."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import fastcv
from fastcv.cli.detect import save_boxes

from . import detector, faces


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastcv.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo_output/astronaut.png"))
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each way")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        import facenet_pytorch  # noqa: F401
        import torchvision  # noqa: F401
        from skimage.data import astronaut
    except ImportError as error:
        print(
            f"the demo needs {error.name}:\n  pip install 'fastcv-kernels[demo]'\n"
            "  pip install --no-deps facenet-pytorch",
            file=sys.stderr,
        )
        return 1
    photograph = astronaut()
    info = fastcv.build_info()
    print(f"fastcv {fastcv.__version__}, torch {info['torch']}, {info['cpu_isa']} kernels, ", end="")
    print(f"{torch.get_num_threads()} threads; medians of {options.rounds} runs, by turns\n")

    print(f"Faces in a photograph of {photograph.shape[1]} x {photograph.shape[0]} (MTCNN of ", end="")
    print("facenet-pytorch, trained weights)")
    comparison, boxes, scores = faces.run(photograph, options.rounds)
    print(comparison.table())
    print(f"  the same {len(boxes)} faces in all ways\n")
    image = torch.from_numpy(photograph).permute(2, 0, 1)
    save_boxes(options.output, image, boxes, [f"{score:.3f}" for score in scores])

    print(f"Objects in the same photograph at {detector.SIZE} pixels (torchvision's ", end="")
    print("fasterrcnn_resnet50_fpn, random weights)")
    comparison, found = detector.run(photograph, max(2, options.rounds - 2))
    print(comparison.table())
    print(f"  the same {found} detections in all ways\n")
    print('patched: fastcv.patch("torchvision"). accelerated: fastcv.accelerate(model) as well, after its first call.')
    print(f"The faces are drawn in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
