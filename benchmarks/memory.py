"""``python -m benchmarks.memory``: how much memory a model needs beside its own, as it is and accelerated in both ways.

Each way is a process of its own: its resident memory is read when model and input are there, then its peak over five
calls and what remains after them. The first call of an accelerated model, which runs the original once, counts too.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.systems import SYSTEMS
from benchmarks.systems import build as build_system
from fastcv._files import replacing
from fastcv.cli.compare import build

MODELS = "resnet18 resnet50 vgg16 mobilenet_v2 densenet121 fcn_resnet50 fasterrcnn_resnet50_fpn".split()  # noqa: SIM905
WAYS = (None, {}, {"low_memory": True})  # as it is, and arguments of fastcv.accelerate
RESULTS = Path(__file__).resolve().parent / "results"


def _status(field: str) -> float:
    """Megabytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


def _work(pipe, name: str, options: dict | None, threads: int) -> None:
    import fastcv

    torch.set_num_threads(threads)
    model, x = build_system(name) if name in SYSTEMS else build(name, None, 1)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    with torch.inference_mode():
        call = model if options is None else fastcv.accelerate(model, **options)
        for _ in range(5):
            call(x)
    pipe.send((weights, _status("VmHWM") - before, _status("VmRSS") - before))


def measure(name: str, options: dict | None, threads: int) -> tuple[float, float, float]:
    """Megabytes of the model as it is, or accelerated with ``options``: weights, the peak, and after the calls."""
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=_work, args=(other, name, options, threads))
    process.start()
    result = mine.recv()
    process.join()
    return result


def main() -> int:
    if not Path("/proc/self/clear_refs").exists():
        print("this reads Linux's /proc", file=sys.stderr)
        return 1
    environment = harness.environment()
    lines = [
        "# Memory of whole models",
        "",
        f"Megabytes beside model and libraries, {environment['threads']} threads, torch {environment['torch']}; one",
        "image where nothing else is said, float32. Written by `python -m benchmarks.memory`. What remains after the",
        "calls of an accelerated model is prepared weights (Winograd's are four times the size) and the arena of its",
        "activations; with `low_memory=True` most weights are laid out at each call.",
        "",
        "| model | its weights | torch: peak | remains | fastcv: peak | remains | low memory: peak | remains |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in (*MODELS, *SYSTEMS):
        results = [measure(name, way, torch.get_num_threads()) for way in WAYS]
        cells = " | ".join(f"{value:.0f}" for value in (results[0][0], *(v for _, *found in results for v in found)))
        lines.append(f"| {name} | {cells} |")
        print(lines[-1], flush=True)
    with replacing(RESULTS / "memory.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
