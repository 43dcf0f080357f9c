"""``python -m benchmarks.gpu_kernels``: what the assembler says of every GPU kernel, as docs/gpu_kernels.md.

Needs no GPU. Of CUDA kernels the built library is read, of Triton's each variant is compiled for each architecture.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import torch
import triton

from fastcv import _library
from fastcv._files import replacing
from fastcv.triton_kernels._launch import compile_ahead

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
CAPABILITIES = (80, 90, 100, 120)
HEAD = """# GPU kernels

Registers of a thread and bytes of shared memory of a block, for compute capabilities {capabilities}; no kernel spills
registers to the stack, which the tests check. Floors are what the bytes and operations of an example need on an H200
(4.3 TB/s copied, 60 TFLOP/s in float32, 790 in bfloat16): reasoned, not measured. **None of these kernels has been
timed on a GPU yet.** Written by `python -m benchmarks.gpu_kernels` (nvcc, Triton {triton}, torch {torch}).
"""


def cuda_usage(library: Path = ROOT / "fastcv/_C_cuda.so") -> dict[str, dict[int, tuple[int, int, int]]]:
    """Of each kernel of the built library and each architecture: registers, bytes of stack and of shared memory."""
    text = subprocess.run(
        [TOOLS / "cuobjdump", "--dump-resource-usage", library], capture_output=True, text=True, check=True
    ).stdout
    usage: dict[str, dict[int, tuple[int, int, int]]] = {}
    capability, name = 0, ""
    for line in text.splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            capability = int(found[1])
        elif found := re.match(r" Function (\S+):", line):
            name = found[1]
        elif found := dict(re.findall(r"\b(REG|STACK|SHARED):(\d+)", line)):
            usage.setdefault(name, {})[capability] = (int(found["REG"]), int(found["STACK"]), int(found["SHARED"]))
    return usage


def _readable(mangled: dict) -> dict[str, dict]:
    """Kernels by their own names, with the types they are compiled for."""
    names = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    readable = {}
    for name, usage in zip(names.splitlines(), mangled.values(), strict=True):
        found = re.search(r"::(\w+_kernel)(<[^(]*>)?\(", name.replace("(anonymous namespace)::", ""))
        readable[f"{found[1]}{(found[2] or '').replace('fastcv::', '')}"] = usage
    return dict(sorted(readable.items()))


def _floors() -> dict[str, str]:
    """Operator's folder -> the sentences of its CUDA files (and headers) that say "Floor"."""
    floors = {}
    for path in sorted(ROOT.glob("csrc/*/*_cuda.[ch]*")):
        text = re.split("#include|#pragma", path.read_text())[0]
        head = " ".join(line.removeprefix("//").strip() for line in text.splitlines())
        if found := re.search(r"Floor [^.]*(?:\.\d[^.]*)*\.", head):
            floors[path.stem.removesuffix("_cuda")] = found[0]
    return floors


def _cell(values: list[int]) -> str:
    return " / ".join(map(str, values)) if len(set(values)) > 1 else str(values[0])


def cuda_table() -> list[str]:
    lines = ["| kernel | registers | shared, static |", "|---|---|---|"]
    for name, usage in _readable(cuda_usage()).items():
        columns = [[usage[c][i] for c in CAPABILITIES if c in usage] for i in (0, 2)]
        lines.append(f"| `{name}` | {_cell(columns[0])} | {_cell(columns[1])} |")
    lines += ["", "Floors, from the files' heads:", ""]
    return [*lines, *(f"- `{stem}`: {text[0].lower()}{text[1:]}" for stem, text in _floors().items())]


def triton_table() -> list[str]:
    lines = ["| kernel | types | warps, stages | registers | shared | matrix | example and floor |", "|" + "---|" * 7]
    for stem in sorted(set(_library.TRITON.values())):
        for variant in importlib.import_module(f"fastcv.triton_kernels.{stem}").VARIANTS:
            reports = [compile_ahead(variant, capability) for capability in CAPABILITIES]
            types = ", ".join(dict.fromkeys(t[1:] for t in variant.types.values() if t.startswith("*")))
            matrix = ", ".join(dict.fromkeys(r.matrix for r in reports if r.matrix))
            lines.append(
                f"| `{variant.name}` | {types} | {variant.num_warps}, {variant.num_stages} "
                f"| {_cell([r.registers for r in reports])} | {_cell([r.shared for r in reports])} | {matrix} "
                f"| {variant.note} |"
            )
            print(lines[-1], flush=True)
    return lines


def main() -> int:
    head = HEAD.format(
        capabilities=" / ".join(f"{c / 10:g}" for c in CAPABILITIES), triton=triton.__version__, torch=torch.__version__
    )
    parts = [head, "## CUDA\n", *cuda_table(), "\n## Triton\n", *triton_table()]
    with replacing(ROOT / "docs/gpu_kernels.md") as path:
        path.write_text("\n".join(parts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
