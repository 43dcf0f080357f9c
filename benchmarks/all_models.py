"""``python -m benchmarks.all_models``: every image model of torchvision, as it is and accelerated, by turns.

Weights are random, from a fixed seed. Classifiers see one image of their size, the others one of 640 x 480.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import torch

import fastcv
from benchmarks import harness
from fastcv._files import replacing
from fastcv.cli.compare import build, largest_difference, time_by_turns

RESULTS = Path(__file__).resolve().parent / "results"


def find_models() -> list[str]:
    import torchvision.models as models

    kinds = (models, models.segmentation, models.detection)
    return [name for kind in kinds for name in models.list_models(kind)]


def measure(name: str, rounds: int) -> dict:
    """Milliseconds of both, and how far the outputs are apart (of a detector: how many detections each gives)."""
    model, x = build(name, None, 1)
    fast = fastcv.accelerate(model)
    with torch.inference_mode():
        expected = model(x)
        fast(x)
        result = fast(x)
        if isinstance(expected, list):
            agreement = f"{len(result[0]['labels'])} of {len(expected[0]['labels'])} detections"
        else:
            agreement = f"{largest_difference(result, expected):.1e}"
        plain, accelerated = time_by_turns((lambda: model(x), lambda: fast(x)), rounds)
    report = fast.fastcv_report
    return {
        "model": name,
        "torch": plain * 1e3,
        "fastcv": accelerated * 1e3,
        "ratio": plain / accelerated,
        "difference": agreement,
        "programs": sum(len(part.programs) for part in report.parts),
        "in torch": sum(len(part.torch_calls) for part in report.parts),
        "left": len(report.left),
    }


def table(rows: list[dict], environment: dict) -> str:
    lines = [
        "# Every image model of torchvision, accelerated",
        "",
        f"{environment['processor']}, {environment['threads']} threads, torch {environment['torch']}; one image, "
        "float32, milliseconds, medians by turns. Written by `python -m benchmarks.all_models`.",
        "",
        "Difference: the largest of the outputs', relative to the largest output. Calls: what stays with torch between",
        "programs. Left: parts that are not captured.",
        "",
        "| model | torch | fastcv | times as fast | difference | programs | calls | left |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: row["ratio"]):
        ratio = f"{row['ratio']:.2f}" if row["ratio"] >= 1 else f"**{row['ratio']:.2f}**"
        lines.append(
            f"| {row['model']} | {row['torch']:.1f} | {row['fastcv']:.1f} | {ratio} | {row['difference']} | "
            f"{row['programs']} | {row['in torch']} | {row['left']} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all_models", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", help="default: all, and the table is kept in benchmarks/results")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    rows = []
    for name in options.models or find_models():
        rows.append(measure(name, options.rounds))
        gc.collect()
        print(
            "  ".join(f"{key} {f'{v:.2f}' if isinstance(v, float) else v}" for key, v in rows[-1].items()), flush=True
        )
    text = table(rows, harness.environment())
    if options.models is None:
        with replacing(RESULTS / "all_models.md") as temporary:
            temporary.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
