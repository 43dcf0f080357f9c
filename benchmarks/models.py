"""``python -m benchmarks.models``: whole models on each runtime that is installed.

Every runtime is a process of its own with one model in it; they take turns, a few calls each, so that the machine's
moods hit all alike. Outputs are compared with torch's before anything is timed. Models have random weights from a fixed
seed and batch norms whose statistics are not trivial. What is not installed, cannot run a model, or (torch.compile)
takes too long to compile it, is named in the table.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import harness, systems
from benchmarks.systems import SYSTEMS, with_statistics
from fastcv._files import replacing

RESULTS = Path(__file__).resolve().parent / "results"
CLASSIFIERS = (  # noqa: SIM905
    "alexnet vgg16 googlenet inception_v3 resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 mobilenet_v2 "
    "mobilenet_v3_large efficientnet_b0 shufflenet_v2_x1_0 squeezenet1_1 mnasnet1_0 regnet_y_1_6gf convnext_tiny"
).split()
BACKBONE = "fasterrcnn_resnet50_fpn backbone"
BACKBONE_BF16 = f"{BACKBONE}, bfloat16"  # where fastcv and OpenVINO compute in it
DETECTOR = "fasterrcnn_resnet50_fpn"  # on an image of 640x480, with scores spread as trained weights spread them
ORDER = (*CLASSIFIERS, *SYSTEMS, BACKBONE, BACKBONE_BF16, DETECTOR)  # of the table
RUNTIMES = ("fastcv", "torch", "torch, channels-last", "torch.compile", "ONNX Runtime", "OpenVINO")
ROUNDS, SECONDS = 7, 0.25  # turns of each runtime, and about how long one is
COMPILE_LIMIT = 300.0  # seconds that torch.compile may take for one model
TOLERANCE = 1e-3  # of the largest output: runtimes may compute in other orders, but not something else


def build(name: str) -> tuple[torch.nn.Module, torch.Tensor | list[torch.Tensor]]:
    """A model in evaluation mode, and what it is called with."""
    torch.manual_seed(0)
    if name in SYSTEMS:
        return systems.build(name)
    import torchvision

    if name == DETECTOR:
        from fastcv.demo import detector

        image = torch.rand(3, 480, 640)
        return detector.build(image), [image]
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    if name in (BACKBONE, BACKBONE_BF16):
        model = torchvision.models.get_model(name.split()[0], weights=None, weights_backbone=None).backbone
    else:
        model = torchvision.models.get_model(name, weights=None, **options)
    size = (800, 1088) if name in (BACKBONE, BACKBONE_BF16) else (299, 299) if name == "inception_v3" else (224, 224)
    return with_statistics(model).eval(), torch.randn(1, 3, *size)


# ---- runtimes: each returns a function without arguments that gives the outputs as a list of arrays ------------------


def _leaves(outputs) -> list:
    return [leaf.detach().float().numpy() for leaf in torch.utils._pytree.tree_leaves(outputs)]


def _torch(model, x, name):
    """In the row of bfloat16 as torch does it: matrix products and convolutions in bfloat16, by autocast."""

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=name == BACKBONE_BF16):
            return _leaves(model(x))

    return call


def _channels_last(model, x, name):
    if isinstance(x, torch.Tensor):  # a detector makes its batch itself
        x = x.contiguous(memory_format=torch.channels_last)
    return _torch(model.to(memory_format=torch.channels_last), x, name)


def _compile(model, x, name):
    return _torch(torch.compile(model), x, name)


def _fastcv(model, x, name):
    import fastcv

    dtype = torch.bfloat16 if name == BACKBONE_BF16 else torch.float32
    model = fastcv.accelerate(model, dtype=dtype)
    return lambda: _leaves(model(x))


@contextlib.contextmanager
def _onnx(model, x):
    """The path of the exported model, which is gone after the block: both runtimes have read it by then."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        torch.onnx.export(model, (x,), path, dynamo=False, opset_version=17)
        yield path


def _array(x):
    return (x if isinstance(x, torch.Tensor) else x[0]).numpy()


def _onnxruntime(model, x, name):
    if name == BACKBONE_BF16:
        raise NotImplementedError("no bfloat16 on the CPU")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with _onnx(model, x) as path:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: _array(x)}
    return lambda: session.run(None, inputs)


def _openvino(model, x, name):
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if name == BACKBONE_BF16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    with _onnx(model, x) as path:
        compiled = openvino.Core().compile_model(path, "CPU", options)
    request, array = compiled.create_infer_request(), _array(x)

    def call():
        results = request.infer([array])
        return [results[output] for output in compiled.outputs]

    return call


PREPARE: dict[str, Callable] = dict(
    zip(RUNTIMES, (_fastcv, _torch, _channels_last, _compile, _onnxruntime, _openvino), strict=True)
)


def _work(pipe, runtime: str, name: str, threads: int) -> None:
    """A runtime's process: builds, sends its outputs, then times as many calls as it is asked for."""
    if runtime == "torch.compile" and hasattr(os, "setpgrp"):
        os.setpgrp()  # see _stop
    torch.set_num_threads(threads)
    try:
        model, x = build(name)
        with torch.no_grad():
            call = PREPARE[runtime](model, x, name)
        with torch.inference_mode() if runtime != "torch.compile" else torch.no_grad():
            for _ in range(3):
                outputs = call()
            pipe.send([output.copy() for output in outputs])
            while calls := pipe.recv():
                call()  # what others left in the caches is gone
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                pipe.send((time.perf_counter() - start) / calls)
    except ImportError as error:
        pipe.send(f"not installed ({error.name})")
    except NotImplementedError as error:
        pipe.send(str(error))
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"failed ({type(error).__name__})")


@dataclasses.dataclass
class Row:
    model: str
    seconds: dict[str, float]  # of runtimes that ran
    missing: dict[str, str]  # and why others did not

    def ratio(self, *others: str) -> float:
        """The best of the others' time over fastcv's."""
        return min(self.seconds.get(other, math.nan) for other in others) / self.seconds["fastcv"]


def _check(name: str, runtime: str, results: list, expected: list) -> None:
    """Outputs agree; of a detector, that there are as many detections (their order is a matter of rounding)."""
    for result, wanted in zip(results, expected, strict=True):
        if name == DETECTOR:
            assert abs(len(result) - len(wanted)) <= 0.05 * len(wanted), f"{name}: {runtime}: {len(result)} detections"
            continue
        error = abs(result - wanted).max() / abs(wanted).max()
        tolerance = 0.1 if name == BACKBONE_BF16 else TOLERANCE
        assert error <= tolerance, f"{name}: {runtime} differs from torch by {error:.1e}"


def _stop(process) -> None:
    """With the compilers that it started, which would outlive it otherwise."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):  # killed before it was the head of its group
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _first_outputs(pipe, process, limit: float | None) -> list | str:
    """What a runtime's process sends when it is ready, or why it will not be."""
    try:
        if limit is None or pipe.poll(limit):
            return pipe.recv()
    except EOFError:  # it died
        process.join()
        return f"failed (exit status {process.exitcode})"
    _stop(process)
    return f"compiling took over {limit:g} s"


def measure(name: str, runtimes: tuple[str, ...], threads: int, compile_limit: float = COMPILE_LIMIT) -> Row:
    context = multiprocessing.get_context("spawn")
    pipes, processes, outputs = {}, {}, {}
    for runtime in runtimes:  # one after the other: building one must not disturb another
        pipes[runtime], other = context.Pipe()
        processes[runtime] = context.Process(target=_work, args=(other, runtime, name, threads), daemon=True)
        processes[runtime].start()
        other.close()  # so that the end of the process is the end of the pipe
        limit = compile_limit if runtime == "torch.compile" else None
        outputs[runtime] = _first_outputs(pipes[runtime], processes[runtime], limit)
    missing = {runtime: why for runtime, why in outputs.items() if isinstance(why, str)}
    running = [runtime for runtime in runtimes if runtime not in missing]
    for runtime in running:
        _check(name, runtime, outputs[runtime], outputs["torch"])
    times: dict[str, list[float]] = {runtime: [] for runtime in running}
    calls = dict.fromkeys(running, 1)
    for _ in range(ROUNDS + 1):
        for runtime in running:
            pipes[runtime].send(calls[runtime])
            seconds = pipes[runtime].recv()
            times[runtime].append(seconds)
            calls[runtime] = max(1, min(100, int(SECONDS / seconds)))
    for runtime in running:
        pipes[runtime].send(0)
        processes[runtime].join()
    return Row(name, {r: statistics.median(t[1:]) for r, t in times.items()}, missing)


# ---- the table -------------------------------------------------------------------------------------------------------


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def table(rows: list[Row], environment: dict) -> str:
    runtimes = [r for r in RUNTIMES if any(r in row.seconds or r in row.missing for row in rows)]
    others = [r for r in runtimes if r not in ("fastcv", "torch")]
    lines = [
        "# Whole models",
        "",
        f"{environment['processor']}, {environment['threads']} threads, torch {environment['torch']}; batch 1 and "
        "float32 where nothing else is said, milliseconds, the median of turns. In bfloat16 torch runs under autocast. "
        "Rows are each measured in one go, not all on one day. Written by `python -m benchmarks.models`.",
        "",
        *(
            [f"Not measured: {', '.join(r for r in RUNTIMES if r not in runtimes)}.", ""]
            if len(runtimes) < len(RUNTIMES)
            else []
        ),
        f"| model | {' | '.join(runtimes)} | torch / fastcv | best other / fastcv |",
        "|---|" + "---:|" * (len(runtimes) + 2),
    ]
    for row in rows:
        cells = [f"{row.seconds[r] * 1e3:.1f}" if r in row.seconds else row.missing.get(r, "") for r in runtimes]
        best = [row.ratio(r) for r in others if r in row.seconds]
        lines.append(
            f"| {row.model} | {' | '.join(cells)} | {row.ratio('torch'):.2f} | {min(best, default=math.nan):.2f} |"
        )
    classifiers = [row for row in rows if row.model in CLASSIFIERS]
    if classifiers:
        lines += ["", f"Geometric means over the {len(classifiers)} classifiers, time of a runtime over fastcv's: "]
        means = [(r, [row.ratio(r) for row in classifiers if r in row.seconds]) for r in runtimes if r != "fastcv"]
        lines[-1] += ", ".join(f"{r} {geometric_mean(values):.2f}" for r, values in means if values) + "."
        runners = [r for r in ("ONNX Runtime", "OpenVINO") if all(r in row.seconds for row in classifiers)]
        if runners:
            best = geometric_mean([row.ratio(*runners) for row in classifiers])
            lines[-1] += f" The better of {' and '.join(runners)}: {best:.2f}."
    return "\n".join(lines) + "\n"


def save_chart(path: Path, rows: list[Row], environment: dict) -> None:
    """How many times as fast as torch each runtime runs each model: a dot each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"fastcv": "#c8442c", "ONNX Runtime": "#2a7f9e", "OpenVINO": "#6a51a3", "torch.compile": "#999999"}
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.27 * len(rows)), layout="constrained")
    for runtime, colour in reversed(colours.items()):
        points = [
            (row.seconds["torch"] / row.seconds[runtime], y) for y, row in enumerate(rows) if runtime in row.seconds
        ]
        if points:
            x, y = zip(*points, strict=True)
            size = 60 if runtime == "fastcv" else 36
            axes.scatter(x, y, color=colour, s=size, label=runtime, edgecolor="white", zorder=2)
    axes.set_yticks(range(len(rows)), [row.model for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(1, color="black", linewidth=1, zorder=0)
    axes.grid(color="#e4e4e4", zorder=0)
    axes.set_xlim(left=0)
    axes.set_xlabel(
        "times as fast as torch in its default memory format; float32 but where bfloat16 is said", fontsize=8
    )
    axes.set_title(f"{environment['processor']}, {environment['threads']} threads", fontsize=8, loc="left")
    axes.legend(fontsize=8, loc="lower right")
    figure.suptitle("Whole models", fontsize=12)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def short_table(rows: list[Row]) -> str:
    """Milliseconds of a few models, for the README; of torch in its better memory format."""
    chosen = ["vgg16", "resnet18", "resnet50", "mobilenet_v2", *SYSTEMS, BACKBONE, BACKBONE_BF16, DETECTOR]
    columns = {
        "torch": ("torch", "torch, channels-last"),  # the better of the two
        **{name: (name,) for name in ("torch.compile", "ONNX Runtime", "OpenVINO", "fastcv")},
    }
    columns = {name: rs for name, rs in columns.items() if any(r in row.seconds for row in rows for r in rs)}
    lines = [f"| milliseconds | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        if row.model in chosen:
            times = [[row.seconds[r] for r in runtimes if r in row.seconds] for runtimes in columns.values()]
            cells = [f"{min(each) * 1e3:.1f}" if each else "" for each in times]
            lines.append(f"| {row.model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def update_readme(rows: list[Row]) -> None:
    """The table between the two marks."""
    path, begin, end = RESULTS.parents[1] / "README.md", "<!-- models -->\n", "\n<!-- end of models -->"
    text = path.read_text()
    head, rest = text.split(begin)
    with replacing(path) as temporary:
        temporary.write_text(head + begin + short_table(rows) + end + rest.split(end)[1])


def updated(kept: list[Row], measured: list[Row]) -> list[Row]:
    """``kept`` with the rows of models that were measured again, new ones where the table's order has them."""
    rows = {row.model: row for row in (*kept, *measured)}
    order = [name for name in ORDER if name in rows]
    return [rows[name] for name in (*order, *(name for name in rows if name not in order))]


def save(folder: Path, rows: list[Row], environment: dict) -> None:
    """models.json, models.md and models.png; in the place for results the README's table too."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "models.json") as temporary:
        temporary.write_text(
            json.dumps({"environment": environment, "rows": [vars(row) for row in rows]}, indent=1) + "\n"
        )
    with replacing(folder / "models.md") as temporary:
        temporary.write_text(table(rows, environment))
    save_chart(folder / "models.png", rows, environment)
    if folder == RESULTS:
        update_readme(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=None, help="names of the table or of torchvision; default: those of the table"
    )
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--compile-limit", type=float, default=COMPILE_LIMIT, metavar="SECONDS",
        help="what torch.compile has not compiled by then is left out, as the table says; default: %(default)g",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results for a whole run, else none")
    parser.add_argument("--update", action="store_true", help="put the rows measured now into the kept results")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="write table and chart of an earlier run again")
    options = parser.parse_args(arguments)
    if options.redraw:
        earlier = json.loads(options.redraw.read_text())
        save(options.output or RESULTS, [Row(**row) for row in earlier["rows"]], earlier["environment"])
        return 0
    torch.set_num_threads(options.threads)
    chosen = [r for r in options.runtimes if not (options.no_compile and r == "torch.compile")]
    runtimes = tuple(dict.fromkeys(("fastcv", "torch", *chosen)))
    rows = []
    for name in options.models or ORDER:
        rows.append(measure(name, runtimes, options.threads, options.compile_limit))
        times = ", ".join(f"{runtime} {seconds * 1e3:.1f} ms" for runtime, seconds in rows[-1].seconds.items())
        print(f"{name}: {times} {rows[-1].missing or ''}", flush=True)
    environment = harness.environment()
    print(table(rows, environment))
    folder = options.output or (RESULTS if options.models is None and len(runtimes) == len(RUNTIMES) else None)
    if options.update:
        folder = options.output or RESULTS
        kept = [Row(**row) for row in json.loads((folder / "models.json").read_text())["rows"]]
        rows = updated(kept, rows)
    if folder is not None:
        save(folder, rows, environment)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
