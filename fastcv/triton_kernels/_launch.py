"""What launchers share: the device they run on, types, and how kernels are compiled without one."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from torch import Tensor


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: that of ``x``, where it is not under the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel with types and constants: one thing to compile."""

    kernel: triton.JITFunction
    types: dict[str, str]
    """Of each parameter that is no constant: ``"*fp16"``, ``"fp32"``, ``"i32"``, ``"i64"``, ... Pointers are taken as
    aligned to 16 bytes, and integers named in ``divisible`` as multiples of 16."""
    constants: dict[str, object]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    matrix: bool = False
    """Whether it must use matrix instructions."""
    enable_fp_fusion: bool = True
    """Whether products may be fused into sums."""
    note: str = ""
    """What it is an example of, and its floor: bytes, operations."""

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.strip("_")


@dataclasses.dataclass(frozen=True)
class Report:
    """What the assembler says of a variant on one architecture."""

    registers: int
    stack: int
    """Bytes of a thread's stack: spilled registers, as Triton's kernels have no arrays of their own."""
    shared: int
    """Bytes of a block's shared memory."""
    matrix: str
    """The matrix instruction it uses, such as ``"wgmma"``, or an empty string."""


def compile_ahead(variant: Variant, capability: int) -> Report:
    """Compile for a compute capability such as 90, on a machine without a GPU.

    Raises:
        RuntimeError: the assembler's report cannot be read.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {n: "constexpr" if n in variant.constants else variant.types[n] for n in names}
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*") or n in variant.divisible]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in variant.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {name: getattr(variant, name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    found = re.search(r"\b(wgmma|tcgen05|mma\.sync)", compiled.asm["ptx"])
    usage = _resource_usage(compiled.asm["cubin"])
    return Report(usage["REG"], usage["STACK"], compiled.metadata.shared, found[1] if found else "")


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """``cuobjdump``'s numbers for the one kernel of a cubin; the program comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    if "REG" not in numbers:
        raise RuntimeError(f"cuobjdump: expected the registers of a kernel, got {text!r}")
    return numbers
