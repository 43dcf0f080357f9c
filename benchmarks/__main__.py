"""``python -m benchmarks``: run all cases, print each, and keep table, chart and measurements."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

from benchmarks import harness, report
from fastcv._library import TRITON_WANTED, implementation
from fastcv._plan import known_choices

HERE = Path(__file__).resolve().parent


def find_cases(only: str, device: str = "cpu") -> list[harness.Case]:
    """The cases of all ``bench_*.py`` whose operator's name contains ``only``; of ``gpu*.py`` for a GPU."""
    names = [path.stem for path in sorted(HERE.glob("bench_*.py"))] if device == "cpu" else ["gpu", "gpu_models"]
    modules = [importlib.import_module(f"benchmarks.{name}") for name in names]
    return [case for module in modules for case in module.CASES if only in case.operator]


def _runs(operator: str, by_plan: bool) -> bool:
    """On a GPU: models with a plan, as users would have them, and without one all else; with one what it decides."""
    if operator == "accelerate":
        return by_plan
    return not by_plan or implementation(operator, "cuda") == "plan"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default="", help="operators whose name contains this")
    parser.add_argument("--quick", action="store_true", help="few rounds and no long cases")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; default: torch's")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for the device's .json, .md and .png; default: benchmarks/results, and nothing "
        "for a partial run (--only, --quick)",
    )
    return parser.parse_args(arguments)


def _results(cases: list[harness.Case], options: argparse.Namespace) -> tuple[list[harness.Result], list[str]]:
    """What was measured, each printed, and the names of cases that failed: the others are worth their time."""
    results, failed = [], []
    for case in cases:
        try:
            for result in harness.run([case], quick=options.quick, device=options.device):
                results.append(result)
                times = [f"{n} {report.format_seconds(t.median)}" for n, t in result.times.items()]
                ratio = report.format_ratio(result.ratio)
                print(f"{ratio:>6}  {result.operator}: {result.shape}  ({', '.join(times)})", flush=True)
        except (AssertionError, RuntimeError) as error:
            failed.append(case.name)
            print(f"failed  {case.name}: {error}", file=sys.stderr, flush=True)
    return results, failed


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    by_plan = options.device == "cuda" and TRITON_WANTED == "plan"
    if options.device == "cuda" and TRITON_WANTED not in ("all", "plan"):
        print("set FASTCV_TRITON=all, or plan: else torch's kernels would be timed against themselves", file=sys.stderr)
        return 1
    cases = find_cases(options.only, options.device)
    if options.device == "cuda":
        cases = [case for case in cases if _runs(case.operator, by_plan)]
    if not cases:
        print(f"no operator's name contains {options.only!r}", file=sys.stderr)
        return 1
    environment = harness.environment(options.device)
    print(report.title(environment), flush=True)
    results, failed = _results(cases, options)
    folder = options.output
    if folder is None and not (options.only or options.quick):
        folder = HERE / "results"
    if folder is not None:
        name = "gpu_plan" if by_plan else {"cpu": "cpu", "cuda": "gpu"}[options.device]
        report.save_json(folder / f"{name}.json", results, environment)
        report.save_table(folder / f"{name}.md", results, environment)
        report.save_chart(folder / f"{name}.png", results, environment)
        if by_plan:
            report.save_choices(folder / f"{name}_choices.md", known_choices(), environment)
        print(f"written: {folder}/{name}.json, {name}.md, {name}.png")
    slower = [result for result in results if result.ratio < 1]
    print(f"{len(results)} cases, fastcv is slower in {len(slower)}")
    if failed:
        print(f"not measured, as they failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
