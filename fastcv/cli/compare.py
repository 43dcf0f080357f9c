"""``fastcv compare``: a model of torchvision as it is and accelerated."""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from ..accelerate import accelerate
from ..accelerate._table import program_table


def add_parser(commands) -> argparse.ArgumentParser:
    text = "time a model of torchvision as it is and accelerated, with random weights"
    parser = commands.add_parser("compare", help=text, description=text.capitalize() + ".")
    parser.add_argument("model", help="its name in torchvision, such as resnet50")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the image; default: 224, or 480 640")
    parser.add_argument("--batch", type=int, default=1, help="images; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each, by turns; default: %(default)s")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--low-memory", action="store_true", help="keep no second copy of most weights")
    parser.add_argument("--program", action="store_true", help="print every step with its kernel, floor and time")
    return parser


def build(name: str, size: list[int] | None, batch: int):
    """The model, and what it is called with."""
    try:
        from torchvision.models import detection, get_model, list_models, segmentation
    except ImportError:
        raise SystemExit("fastcv compare needs torchvision: pip install torchvision") from None
    if name not in list_models():
        raise SystemExit(f"model: expected a name of torchvision's, such as resnet50, got {name}")
    detector = name in list_models(detection)
    large = detector or name in list_models(segmentation)
    options = {"weights_backbone": None} if large else {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    torch.manual_seed(0)
    model = get_model(name, weights=None, **options).eval()
    side = 299 if name == "inception_v3" else getattr(model, "image_size", 224)
    height, width = size or ((480, 640) if large else (side, side))
    images = torch.rand(batch, 3, height, width)
    return model, list(images) if detector else images


def largest_difference(result, expected) -> float:
    """Of two outputs, relative to the largest value of each tensor; infinity where shapes differ."""
    worst = 0.0
    leaves = torch.utils._pytree.tree_leaves
    for a, b in zip(leaves(result), leaves(expected), strict=True):
        if isinstance(a, torch.Tensor) and a.shape != b.shape:
            return float("inf")
        if isinstance(a, torch.Tensor) and b.numel():
            worst = max(worst, float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)))
    return worst


def time_by_turns(calls, rounds: int) -> list[float]:
    """Median seconds of each."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for kept, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            call()
            kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in times]


def main(arguments: argparse.Namespace) -> int:
    for name in ("batch", "rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise SystemExit(f"--{name}: expected a positive number, got {value}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, x = build(arguments.model, arguments.size, arguments.batch)
    fast = accelerate(model, low_memory=arguments.low_memory)
    with torch.inference_mode():
        expected = model(x)
        fast(x)
        difference = largest_difference(fast(x), expected)
        plain, accelerated = time_by_turns((lambda: model(x), lambda: fast(x)), arguments.rounds)
        print(fast.fastcv_report)
        print(f"\noriginal     {plain * 1e3:9.2f} ms\naccelerated  {accelerated * 1e3:9.2f} ms")
        print(f"faster       {plain / accelerated:9.2f} x, largest relative difference {difference:.1e}")
        if arguments.program:
            _print_programs(fast, x)
    return 0


def _print_programs(fast, x) -> None:
    """Programs with what they are called with in a run of the model."""
    for part in fast.fastcv_report.parts:
        for program in part.programs:
            seen: list[tuple] = []
            handle = program.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs))
            fast(x)
            handle.remove()
            if seen:
                print(f"\n{part.name or '(the model)'}, the first of {len(seen)} calls")
                print(program_table(program, *seen[0]))
