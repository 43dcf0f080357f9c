"""``fastcv info``: versions, what was built, what is live."""

from __future__ import annotations

import argparse
import json
import platform

import torch

from .. import __version__, _library


def add_parser(commands) -> argparse.ArgumentParser:
    text = "versions, compiled libraries, and which implementation of each operator is live"
    parser = commands.add_parser("info", help=text, description=text.capitalize() + ".")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _torchvision_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torchvision")
    except PackageNotFoundError:
        return "not installed"


def collect() -> dict:
    """All that the command prints."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "fastcv": __version__,
        "python": platform.python_version(),
        "torchvision": _torchvision_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cuda_devices": devices,
        **_library.build_info(),
    }


def render(facts: dict) -> str:
    """The same as text."""
    isas = ", ".join(facts["available_isas"]) or "unknown"
    lines = [
        f"fastcv       {facts['fastcv']}",
        f"python       {facts['python']} on {facts['machine']}",
        f"torch        {facts['torch']}, {facts['threads']} threads",
        f"torchvision  {facts['torchvision']}",
        f"CPU kernels  {facts['cpu_isa'] or 'none'} (this processor has: {isas})",
        f"bfloat16     {facts['bfloat16_products']}",
        f"CUDA         {', '.join(facts['cuda_devices']) or 'no device'}",
        f"compiler     {facts['compiler'] or 'unknown'}",
        "",
        "library   state",
    ]
    lines += [f"{name:<9} {state}" for name, state in facts["libraries"].items()]
    if facts["libraries"]["_C_cpu"] != "loaded":
        lines.append(f"To build the compiled part, run: {_library.mend_command()}")
    width = max(len(name) for name in facts["operators"])
    lines += ["", f"{'operator':<{width}}  {'cpu':<9}  cuda"]
    for name, live in facts["operators"].items():
        lines.append(f"{name:<{width}}  {live['cpu']:<9}  {live['cuda']}")
    lines += ["", "patched packages"]
    for package, report in facts["patched"].items():
        lines.append(f"{package}: {', '.join(report['operators'] + report['functions']) or 'nothing'}")
    if not facts["patched"]:
        lines.append("none")
    return "\n".join(lines)


def main(arguments: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))
    return 0
