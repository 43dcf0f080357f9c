"""A program as a table: each step with its kernel, what bounds it, and its measured time."""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor

from ..ops.conv2d import KERNELS
from ..ops.conv_transpose2d import KERNELS as TRANSPOSED
from ._program import Program
from ._steps import CONVOLUTIONS, OPS

# Multiplications of a kernel for one of the direct sum's.
_PRODUCTS = {
    **{"winograd": 36 / 144, "winograd_3x3": 25 / 81, "winograd_2x2": 16 / 36, "winograd_6x6": 64 / 324},
    **{"winograd_5x5": 36 / 100, "winograd_5x5_4x4": 64 / 400},
}


def _best(function) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def product_limit(threads: int, dtype: torch.dtype) -> float:
    """Multiply-adds a second (of a matrix product)."""
    a = torch.randn(1024, 1024).to(dtype)
    return 1024**3 / _best(lambda: a @ a)


@functools.cache
def memory_limit(threads: int) -> float:
    """Bytes a second from memory (of a sum)."""
    large = torch.ones(1 << 26)
    return large.numel() * 4 / _best(large.sum)


def _products(kernel: str, transposed: bool) -> float:
    """Those of a transposed convolution's phases, taken as 2x2."""
    if transposed:
        return {"winograd": 36 / 100, "winograd_3x3": 25 / 64, "winograd_2x2": 16 / 36}.get(kernel, 1.0)
    return _PRODUCTS.get(kernel, 1.0)


def program_table(program: Program, *inputs: Tensor) -> str:
    """One line for each step of ``program`` on these inputs.

    The floor of a convolution is its arithmetic or the reading of its weights from memory, whichever takes longer; that
    of other steps is reading and writing their maps once at the speed of memory, and caches are faster. "gemm x14" ran
    in 14 bands of rows, each followed by the next step's while it was in cache; "winograd x2" in two pieces: weights
    were laid out, then used (``low_memory``).
    """
    threads = torch.get_num_threads()
    memory = memory_limit(threads)
    lines = [f"{'step':<18}{'kernel':<16}{'input':<22}{'output':<20}{'us':>9}{'floor':>9}{'GFLOP/s':>9}"]
    total = bound = 0.0
    for row in program.profile(*inputs).tolist():
        op, kernel, nanoseconds, work, size, n, c, h, w, out_c, out_h, out_w, kh, kw, stride, *_, groups, _, bands = row
        name = "copy" if op < 0 else OPS[op]
        if name in CONVOLUTIONS:
            transposed = name == "conv_transpose"
            name = (
                f"{'transposed' if transposed else name} {kh}x{kw}"
                + (f"/{stride}" if stride > 1 else "")
                + (f" g{groups}" if groups > 1 else "")
            )
            chosen = TRANSPOSED[kernel] if transposed else KERNELS[kernel]
            dtype = torch.bfloat16 if chosen in ("bf16", "amx") else torch.float32
            products = product_limit(threads, dtype)
            weights = out_c * (c // groups) * kh * kw
            floor = max(work * _products(chosen, transposed) / products, 4 * weights / memory)
        else:
            chosen, floor = "", size / memory
        total, bound = total + nanoseconds / 1e3, bound + floor * 1e6
        chosen += f" x{bands}" if bands > 1 else ""
        rate = f"{2 * work / nanoseconds:.0f}" if work and nanoseconds else ""
        sizes = f"{f'{n}x{c}x{h}x{w}':<22}{f'{n}x{out_c}x{out_h}x{out_w}':<20}"
        lines.append(f"{name:<18}{chosen:<16}{sizes}{nanoseconds / 1e3:>9.1f}{floor * 1e6:>9.1f}{rate:>9}")
    lines.append(f"{'in all':<74}{total:>9.1f}{bound:>9.1f}")
    return "\n".join(lines)
