"""What ``python -m benchmarks`` leaves behind: the measurements, a table and a chart."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from benchmarks.harness import Result, Times
from fastcv._files import replacing


def title(environment: dict) -> str:
    """Where and with what, in two lines."""
    return (
        f"{environment['processor']}, {environment['cores']} cores, {environment['threads']} "
        f"threads, {environment['cpu_isa']} kernels, {environment['machine']}\n"
        f"fastcv {environment['fastcv']}, torch {environment['torch']}, torchvision "
        f"{environment['torchvision']}, Python {environment['python']}, {environment['date']}"
    )


def format_seconds(seconds: float) -> str:
    unit, scale = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * scale:.3g} {unit}"


def format_ratio(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x" if ratio >= 2 else f"{ratio:.2f}x"


def _spread(times: Times) -> str:
    low, high = format_seconds(times.p20), format_seconds(times.p80)
    return f"{format_seconds(times.median)} ({low} to {high})"


def save_json(path: Path, results: list[Result], environment: dict) -> None:
    rows = [{**dataclasses.asdict(result), "ratio": result.ratio} for result in results]
    with replacing(path) as temporary:
        content = {"environment": environment, "unit": "seconds", "results": rows}
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def save_table(path: Path, results: list[Result], environment: dict) -> None:
    lines = [
        "# Measured on the CPU",
        "",
        *title(environment).split("\n"),
        "",
        "Times are medians, with the 20th and 80th percentile. Contenders gave the same results "
        "and took turns in one process. The ratio says how many times faster fastcv is; below 1 "
        "it is slower. `make bench` writes this file.",
    ]
    operator = None
    for result in results:
        if result.operator != operator:
            operator = result.operator
            lines += ["", f"## {operator}", "", "| shape | fastcv | against | time | ratio |"]
            lines.append("|---|---|---|---|---|")
        (_, ours), *others = result.times.items()
        for name, times in others:
            ratio = times.median / ours.median
            mark = f"**{format_ratio(ratio)}**" if ratio >= 1 else f"{format_ratio(ratio)}, slower"
            lines.append(f"| {result.shape} | {_spread(ours)} | {name} | {_spread(times)} | {mark} |")
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def save_chart(path: Path, results: list[Result], environment: dict) -> None:
    """One bar a case on a logarithmic axis; left of 1, in another colour, fastcv is slower."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"{result.operator}: {result.shape}" for result in results]
    ratios = [result.ratio for result in results]
    figure, axes = plt.subplots(figsize=(11, 1.6 + 0.26 * len(results)), layout="constrained")
    colours = ["#2a7f9e" if ratio >= 1 else "#c8442c" for ratio in ratios]
    # A bar starts at 1, so that its length is the gain (or loss) on the logarithmic axis.
    axes.barh(names, [ratio - 1 for ratio in ratios], left=1, color=colours)
    for row, (ratio, result) in enumerate(zip(ratios, results, strict=True)):
        text = f" {format_ratio(ratio)}  ({result.baseline})"
        axes.text(max(ratio, 1), row, text, va="center", fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(min(0.5, min(ratios) * 0.8), max(ratios) * 12)
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("times as fast as the baseline named at the bar (1 = equal; red = slower)")
    axes.set_title(title(environment), fontsize=8, loc="left")
    figure.suptitle("fastcv on the CPU: speed against the operators it replaces", fontsize=12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
