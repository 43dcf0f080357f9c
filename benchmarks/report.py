"""What ``python -m benchmarks`` leaves behind: the measurements, a table and a chart."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from benchmarks.harness import Result, Times
from fastcv._files import replacing
from fastcv._plan import Choice

WHERE, MAKE = {"cpu": "the CPU", "cuda": "the GPU"}, {"cpu": "bench", "cuda": "bench-gpu"}


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
        f"# Measured on {WHERE[environment.get('device', 'cpu')]}",
        "",
        *title(environment).split("\n"),
        "",
        "Times are medians, with the 20th and 80th percentile. Contenders gave the same results "
        "and took turns in one process. The ratio says how many times faster fastcv is; below 1 "
        "it is slower. The chart and the command line show the ratio to the fastest of the others. "
        f"`make {MAKE[environment.get('device', 'cpu')]}` writes this file.",
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


def save_choices(path: Path, choices: dict[str, Choice], environment: dict) -> None:
    """Whose kernel serves which calls, as :mod:`fastcv._plan` measured it."""
    ours = sum(choice.ours for choice in choices.values())
    lines = [
        "# Whose kernel serves",
        "",
        *title(environment).split("\n"),
        "",
        f"`FASTCV_TRITON=plan`: of {len(choices)} kinds of calls {ours} by Triton's kernel, the rest by the other: "
        "torch's, or for deformable convolution the compiled one.",
        "",
        "| call | serves | Triton | other |",
        "|---|---|---|---|",
    ]
    for call, choice in sorted(choices.items()):
        triton = format_seconds(choice.triton) if choice.triton else "refused"
        serves = "Triton" if choice.ours else "other"
        lines.append(f"| `{call}` | {serves} | {triton} | {format_seconds(choice.other)} |")
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def _rows(results: list[Result]) -> dict[str, list[Result]]:
    """Results by operator and direction, in the order in which they came."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        direction = ", backward" if result.shape.startswith("backward") else ""
        rows.setdefault(f"{result.operator}{direction}", []).append(result)
    return rows


def save_chart(path: Path, results: list[Result], environment: dict) -> None:
    """One dot a case on a logarithmic axis, one row an operator; left of 1, in another colour, fastcv is slower."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = _rows(results)
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.3 * len(rows)), layout="constrained")
    for row, cases in enumerate(rows.values()):
        ratios = sorted(case.ratio for case in cases)
        axes.plot([ratios[0], ratios[-1]], [row, row], color="#b8cdd6", linewidth=3, zorder=1)
        colours = ["#2a7f9e" if ratio >= 1 else "#c8442c" for ratio in ratios]
        axes.scatter(ratios, [row] * len(ratios), color=colours, s=36, alpha=0.8, zorder=2, edgecolor="white")
        ends = format_ratio(ratios[0]) + (f" to {format_ratio(ratios[-1])}" if len(ratios) > 1 else "")
        axes.text(ratios[-1] * 1.15, row, ends, va="center", fontsize=8)
    baselines = [
        f"{name}  (against {' or '.join({case.baseline: 0 for case in cases})})" for name, cases in rows.items()
    ]
    axes.set_yticks(range(len(rows)), baselines, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlim(min(0.7, min(result.ratio for result in results) * 0.8), max(r.ratio for r in results) * 4)
    axes.set_xticks([1, 10, 100], ["1", "10", "100"])
    axes.axvline(1, color="black", linewidth=1, zorder=0)
    axes.grid(axis="x", color="#e4e4e4", zorder=0)
    axes.set_xlabel("times as fast; a dot is one shape, red left of 1 is slower", fontsize=8)
    axes.set_title(title(environment), fontsize=8, loc="left")
    where = WHERE[environment.get("device", "cpu")]
    figure.suptitle(f"fastcv on {where} against the operators that it replaces", fontsize=12)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
