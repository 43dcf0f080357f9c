"""Gram matrices, their gradient and the style loss.

Forward: a program makes a tile of an image's matrix over some of its positions, on the matrix units for half types,
with multiply-adds for float32 and float64. Only tiles on and below the diagonal are made; each is written to both
halves, and a tile on the diagonal from its own lower half, so that the matrix is exactly symmetric. Where tiles are
few, positions are split among programs, whose sums go to scratch memory and are added in one order by a second kernel.
Both finish alike: sums are divided before they are rounded, and in a style loss compared with the target.

Backward: (G' + G'^T) F, a tile of channels x positions to a program. Tiles of the sum are made where they are used:
both halves of G' are small and stay in the caches.

float32 products are "ieee": matrix units round operands to 11 bits ("tf32x3" mends that) but also cut off where they
add, which over the 10^5 positions of an image leaves errors of 10^-4.

512 channels of 64 x 64 in bfloat16: 4 MB read, 1.1 of 2.1 GFLOP made: floor 1.4 us on an H200, and in float32 18 us.
64 channels of 512 x 512 in bfloat16: 34 MB read, floor 8 us. Backward, the first: 8 MB and 2.1 GFLOP, floor 2.7 us.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant, on_device_of

_PROGRAMS = 256  # that keep a GPU of 132 processors busy
_POSITIONS = 256  # at least, of a split: a tile's sums are as many bytes as 32 to 64 positions
_SIDE = 16  # of what a program of the second kernel finishes
_CHUNK = 8192  # terms of a loss that are added at a time


@triton.jit
def _tile_of(t, tiles):
    """Row and column of tile t of those on and below the diagonal: their first and last row fill a line together."""
    line = t // (tiles + 1)
    at = t % (tiles + 1)
    long = tiles - line  # the last row's tiles
    return tl.where(at < long, long - 1, line), tl.where(at < long, at, at - long)


@triton.jit
def _write(out, sums, row, column, channels, count, target, target_i, target_j, terms, term, weight):
    """Sums over ``count`` to both halves of a matrix; with a target the differences from it, and their loss."""
    mask = (row[:, None] < channels) & (column[None, :] <= row[:, None])
    i = row.to(tl.int64)[:, None]
    j = column.to(tl.int64)[None, :]
    lower = sums / tl.full((), count, sums.dtype)
    upper = lower
    if target is not None:
        lower -= tl.load(target + i * target_i + j * target_j, mask=mask, other=0).to(sums.dtype)
        upper -= tl.load(target + j * target_i + i * target_j, mask=mask, other=0).to(sums.dtype)
        squares = tl.where(mask, lower * lower, 0) + tl.where(mask & (i != j), upper * upper, 0)
        tl.store(terms + term, tl.sum(squares) * tl.full((), weight, sums.dtype))
    tl.store(out + i * channels + j, lower.to(out.dtype.element_ty), mask=mask)
    tl.store(out + j * channels + i, upper.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gram_kernel(
    features, partial, out, channels, positions, stride_n, stride_c, stride_p, count, tiles, splits, chunk,
    OPERAND: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """One tile over ``chunk`` positions, to ``partial`` or, where it is None, finished. SINGLE: the only one."""
    SUMS: tl.constexpr = tl.float64 if features.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    number = tiles * (tiles + 1) // 2
    image = (program // number // splits).to(tl.int64)
    tile_row, tile_column = _tile_of(program % number, tiles)
    row = tile_row * BLOCK + tl.arange(0, BLOCK)
    column = tile_column * BLOCK + tl.arange(0, BLOCK)
    of_row = features + image * stride_n + row.to(tl.int64)[:, None] * stride_c
    of_column = features + image * stride_n + column.to(tl.int64)[None, :] * stride_c
    row_inside = (row < channels)[:, None]
    column_inside = (column < channels)[None, :]
    first = (program // number % splits).to(tl.int64) * chunk
    start = first + tl.arange(0, DEPTH)
    sums = tl.zeros((BLOCK, BLOCK), SUMS)
    for k in range(0, tl.minimum(chunk, positions - first), DEPTH):
        inside = start + k < positions
        at = (start + k) * stride_p
        a = tl.load(of_row + at[None, :], mask=row_inside & inside[None, :], other=0)
        if SINGLE:  # noqa: SIM108
            b = tl.trans(a)
        else:
            b = tl.load(of_column + at[:, None], mask=inside[:, None] & column_inside, other=0)
        sums = tl.dot(a.to(OPERAND), b.to(OPERAND), sums, input_precision="ieee", out_dtype=SUMS)
    if partial is not None:
        at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(partial + program.to(tl.int64) * BLOCK * BLOCK + at, sums)
    else:
        out += image * channels * channels
        _write(out, sums, row, column, channels, count, None, 0, 0, None, 0, 0.0)


@triton.jit
def _finish_kernel(
    partial, out, channels, count, tiles, splits, target, target_n, target_i, target_j, terms, weight: tl.float64,
    BLOCK: tl.constexpr, SIDE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """SIDE x SIDE elements of a tile: the sums of all splits, PARTS at a time."""
    ACROSS: tl.constexpr = BLOCK // SIDE
    program = tl.program_id(0)
    number = tiles * (tiles + 1) // 2
    tile = program // (ACROSS * ACROSS) % number
    image = (program // (ACROSS * ACROSS) // number).to(tl.int64)
    i = program // ACROSS % ACROSS * SIDE + tl.arange(0, SIDE)
    j = program % ACROSS * SIDE + tl.arange(0, SIDE)
    sums = tl.zeros((SIDE, SIDE), partial.dtype.element_ty)
    for s in range(0, splits, PARTS):
        split = s + tl.arange(0, PARTS)
        at = ((image * splits + split) * number + tile) * (BLOCK * BLOCK)
        at = at[:, None, None] + (i[:, None] * BLOCK + j[None, :])[None, :, :]
        sums += tl.sum(tl.load(partial + at, mask=(split < splits)[:, None, None], other=0), 0)
    tile_row, tile_column = _tile_of(tile, tiles)
    row = tile_row * BLOCK + i
    column = tile_column * BLOCK + j
    out += image * channels * channels
    if target is not None:
        target += image * target_n
    _write(out, sums, row, column, channels, count, target, target_i, target_j, terms, program, weight)


@triton.jit
def _sum_kernel(terms, out, n, CHUNK: tl.constexpr):
    """All terms of a loss, by one program."""
    sums = tl.zeros((CHUNK,), out.dtype.element_ty)
    for k in range(0, n, CHUNK):
        i = k + tl.arange(0, CHUNK)
        sums += tl.load(terms + i, mask=i < n, other=0)
    tl.store(out, tl.sum(sums))


@triton.jit
def _gram_backward_kernel(
    grad, features, out, channels, positions, count, grad_n, grad_i, grad_j, stride_n, stride_c, stride_p,
    out_n, out_c, out_p, row_blocks, position_blocks,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """ROWS channels of COLUMNS positions. Blocks of one position follow each other: they read the same features."""
    SUMS: tl.constexpr = tl.float64 if features.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    image = (program // row_blocks // position_blocks).to(tl.int64)
    row = (program % row_blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    p = (program // row_blocks % position_blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside = (row < channels)[:, None]
    inside = (p < positions)[None, :]
    direct_row = grad + image * grad_n + (row * grad_i)[:, None]
    mirrored_row = grad + image * grad_n + (row * grad_j)[:, None]
    column = features + image * stride_n + (p * stride_p)[None, :]
    sums = tl.zeros((ROWS, COLUMNS), SUMS)
    for k in range(0, channels, DEPTH):
        c = (k + tl.arange(0, DEPTH)).to(tl.int64)
        mask = row_inside & (c < channels)[None, :]
        direct = tl.load(direct_row + (c * grad_j)[None, :], mask=mask, other=0).to(SUMS)
        mirrored = tl.load(mirrored_row + (c * grad_i)[None, :], mask=mask, other=0).to(SUMS)
        b = tl.load(column + (c * stride_c)[:, None], mask=(c < channels)[:, None] & inside, other=0)
        mean = (0.5 * (direct + mirrored)).to(OPERAND)  # the sum might be beyond float16
        sums = tl.dot(mean, b.to(OPERAND), sums, input_precision=PRECISION, out_dtype=SUMS)
    value = sums * 2 / tl.full((), count, SUMS)
    at = out + image * out_n + row[:, None] * out_c + p[None, :] * out_p
    tl.store(at, value.to(out.dtype.element_ty), mask=row_inside & inside)


# ---- launchers ---------------------------------------------------------------------------------------


def _sum_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _operand(features: Tensor) -> tl.dtype:
    """What is multiplied: Triton's interpreter has no products of bfloat16."""
    if features.dtype == torch.bfloat16:
        return tl.bfloat16 if features.is_cuda else tl.float32
    return {torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}[features.dtype]


def _count(normalize: str, features: Tensor) -> int:
    """What sums are divided by; where there is nothing to sum, 1."""
    channels, positions = features.shape[1], features.shape[2] * features.shape[3]
    if normalize not in ("elements", "positions", "none"):
        raise RuntimeError(f'normalize: expected "elements", "positions" or "none", got "{normalize}"')
    return max(1, {"elements": channels * positions, "positions": positions, "none": 1}[normalize])


class _Tiling(NamedTuple):
    """Tiles of ``block`` x ``block``, ``depth`` positions at a time."""

    block: int
    depth: int
    num_warps: int
    single: bool  # a tile is the whole matrix, and its rows are its columns: read once where that is what takes time


def _tiling(dtype: torch.dtype, channels: int) -> _Tiling:
    block = min(64, max(16, triton.next_power_of_2(channels)))
    if dtype.itemsize > 2:
        return _Tiling(block, 1024 // block, 8 if dtype == torch.float64 else 4, False)
    if channels < 1024:
        return _Tiling(block, 4096 // block, 4, channels <= block)
    return _Tiling(128, 64, 8, False)  # reads half as much for a product, but there are a quarter as many tiles


class _Plan(NamedTuple):
    tiling: _Tiling
    tiles: int  # of a row
    programs: int  # without splits
    splits: int  # 0 for maps without positions
    chunk: int  # positions of a split
    terms: int  # of a loss


def _plan(features: Tensor) -> _Plan:
    images, channels, positions = features.shape
    tiling = _tiling(features.dtype, channels)
    tiles = triton.cdiv(channels, tiling.block)
    programs = images * tiles * (tiles + 1) // 2
    wanted = min(triton.cdiv(_PROGRAMS, max(1, programs)), positions // _POSITIONS)
    chunk = triton.cdiv(triton.cdiv(positions, max(1, wanted)), tiling.depth) * tiling.depth
    splits = triton.cdiv(positions, chunk) if chunk else 0
    return _Plan(tiling, tiles, programs, splits, chunk, programs * (tiling.block // _SIDE) ** 2)


def _launch(features: Tensor, out: Tensor, count: int, plan: _Plan, target=None, terms=None, weight: float = 0.0):
    """``features``: of ``[N, C, P]``."""
    tiling, tiles, programs, splits, chunk, _ = plan
    if programs == 0:
        return
    _, channels, positions = features.shape
    partial = None
    if splits != 1 or target is not None:
        size = programs * splits * tiling.block**2
        partial = torch.empty(size, dtype=_sum_dtype(features), device=features.device)
    if splits:
        _gram_kernel[(programs * splits,)](
            features, partial, out if partial is None else None, channels, positions, *features.stride(), count, tiles,
            splits, chunk, OPERAND=_operand(features), BLOCK=tiling.block, DEPTH=tiling.depth, SINGLE=tiling.single,
            num_warps=tiling.num_warps,
        )  # fmt: skip
    if partial is not None:
        steps = (0, 0, 0) if target is None else (target.stride(0) * (target.shape[0] > 1), *target.stride()[1:])
        _finish_kernel[(programs * (tiling.block // _SIDE) ** 2,)](
            partial, out, channels, count, tiles, splits, target, *steps, terms, weight,
            BLOCK=tiling.block, SIDE=_SIDE, PARTS=min(32, triton.next_power_of_2(max(2, splits))),
        )  # fmt: skip


def gram_matrix(features: Tensor, normalize: str) -> Tensor:
    count = _count(normalize, features)
    out = features.new_empty(features.shape[0], features.shape[1], features.shape[1])
    features = features.flatten(2)  # a copy only of views whose positions lie unevenly
    with on_device_of(features):
        _launch(features, out, count, _plan(features))
    return out


def style_loss(features: list[Tensor], targets: list[Tensor], weights: list[float]) -> list[Tensor]:
    if not len(features) == len(targets) == len(weights) > 0:
        raise RuntimeError("features, targets, weights: expected lists of one length, at least 1")
    flat = [f.flatten(2) for f in features]
    differences = [f.new_empty(f.shape[0], f.shape[1], f.shape[1], dtype=_sum_dtype(f)) for f in flat]
    plans = [_plan(f) for f in flat]
    loss = differences[0].new_empty(())
    terms = loss.new_empty(sum(plan.terms for plan in plans))
    of_layers = terms.split([plan.terms for plan in plans])
    with on_device_of(loss):
        for f, x, out, plan, target, term, weight in zip(
            features, flat, differences, plans, targets, of_layers, weights, strict=True
        ):
            _launch(x, out, _count("elements", f), plan, target, term, weight / (4 * max(1, f.shape[0])))
        _sum_kernel[(1,)](terms, loss, terms.numel(), CHUNK=_CHUNK, num_warps=16)
    return [loss, *differences]


def gram_matrix_backward(grad: Tensor, features: Tensor, normalize: str) -> Tensor:
    images, channels = features.shape[:2]
    if grad.shape != (images, channels, channels):
        raise RuntimeError(f"grad: expected shape {[images, channels, channels]}, got {list(grad.shape)}")
    count, memory_format = _count(normalize, features), torch._prims_common.suggest_memory_format(features)
    out = torch.empty(features.shape, dtype=features.dtype, device=features.device, memory_format=memory_format)
    if out.numel() == 0:
        return out
    x, y = features.flatten(2), out.flatten(2)
    # float32 gradients, as of a style loss, may be beyond float16: the matrix units' float32 has 11 bits as well.
    wide = x.dtype == torch.float16 and grad.dtype != torch.float16
    rows, columns, depth, num_warps = _backward_tiling(x.dtype, channels)
    blocks = triton.cdiv(channels, rows), triton.cdiv(x.shape[2], columns)
    with on_device_of(x):
        _gram_backward_kernel[(images * blocks[0] * blocks[1],)](
            grad, x, y, channels, x.shape[2], count, *grad.stride(), *x.stride(), *y.stride(), *blocks,
            OPERAND=tl.float32 if wide else _operand(x), PRECISION="tf32" if wide else "ieee",
            ROWS=rows, COLUMNS=columns, DEPTH=depth, num_warps=num_warps,
        )  # fmt: skip
    return out


def _backward_tiling(dtype: torch.dtype, channels: int) -> tuple[int, int, int, int]:
    """Channels, positions, and channels of a step of a program; warps."""
    rows = min(64, max(16, triton.next_power_of_2(channels)))
    if dtype.itemsize == 2:
        return rows, 128, 32, 8
    return (rows, 128, 16, 8) if dtype == torch.float32 else (min(32, rows), 64, 32, 4)


# ---- compiled ahead ------------------------------------------------------------------------------------

_TYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32, "fp64": tl.float64}
_TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def _arguments(kernel: triton.JITFunction, pointers: dict[str, str], constants: dict, last: dict[str, bool]):
    """Types and constants: what is no pointer is an integer; ``last``: whose positions, or else channels, are dense."""
    constants = constants | {f"{name}_{'p' if dense else 'c'}": 1 for name, dense in last.items()}
    types = {name: "fp64" if name == "weight" else "i32" for name in kernel.arg_names} | pointers
    return {name: value for name, value in types.items() if name not in constants}, constants


def _forward_variant(dtype: str, channels: int, dense: bool, split: bool, note: str) -> Variant:
    tiling = _tiling(_TORCH[dtype], channels)
    constants = {"OPERAND": _TYPES[dtype], "BLOCK": tiling.block, "DEPTH": tiling.depth, "SINGLE": tiling.single}
    pointers = {"features": f"*{dtype}"}
    if split:
        pointers["partial"], constants["out"] = f"*{'fp64' if dtype == 'fp64' else 'fp32'}", None
    else:
        pointers["out"], constants["partial"] = f"*{dtype}", None
    types, constants = _arguments(_gram_kernel, pointers, constants, {"stride": dense})
    divisible = ("channels", "positions", "stride_n", "stride_c", "stride_p", "chunk")
    matrix = dtype in ("fp16", "bf16")
    return Variant(_gram_kernel, types, constants, divisible, tiling.num_warps, matrix=matrix, note=note)


def _finish_variant(dtype: str, style: bool, parts: int, note: str) -> Variant:
    constants = {"BLOCK": 64, "SIDE": _SIDE, "PARTS": parts}
    pointers = {"partial": "*fp32", "out": f"*{dtype}"}
    if style:
        pointers |= {"target": f"*{dtype}", "terms": "*fp32"}
        constants["target_j"] = 1
    else:
        constants |= {"target": None, "terms": None}
    return Variant(_finish_kernel, *_arguments(_finish_kernel, pointers, constants, {}), ("channels",), note=note)


def _backward_variant(dtype: str, grad: str, dense: bool, note: str) -> Variant:
    rows, columns, depth, num_warps = _backward_tiling(_TORCH[dtype], 512)
    wide = dtype == "fp16" and grad == "fp32"
    constants = {"OPERAND": tl.float32 if wide else _TYPES[dtype], "PRECISION": "tf32" if wide else "ieee"}
    constants |= {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "grad_j": 1}
    pointers = {"grad": f"*{grad}", "features": f"*{dtype}", "out": f"*{dtype}"}
    types, constants = _arguments(_gram_backward_kernel, pointers, constants, {"stride": dense, "out": dense})
    divisible = tuple(name for name in types if name not in ("count", "row_blocks", "position_blocks"))
    matrix = dtype in ("fp16", "bf16")
    return Variant(_gram_backward_kernel, types, constants, divisible, num_warps, matrix=matrix, note=note)


VARIANTS = [
    _forward_variant("bf16", 512, True, True, "1 x 512 x 64 x 64; 4.2 MB, 1.1 GFLOP: 1.4 us"),
    _forward_variant("fp16", 512, False, True, "1 x 512 x 64 x 64, channels-last; 1.4 us"),
    _forward_variant("bf16", 64, True, True, "1 x 64 x 512 x 512; 34 MB: 8 us"),
    _forward_variant("fp16", 2048, True, False, "16 x 2048 x 14 x 14; 13 MB in, 134 MB out: 34 us"),
    _forward_variant("fp32", 512, True, True, "1 x 512 x 64 x 64; 1.1 GFLOP without matrix units: 18 us"),
    _forward_variant("fp64", 512, True, True, "1 x 512 x 64 x 64"),
    _finish_variant("bf16", False, 8, "512 channels, 8 splits; 4.7 MB: 1.1 us"),
    _finish_variant("fp32", True, 32, "64 channels, 256 splits, differences; 4.2 MB: 1 us"),
    Variant(
        _sum_kernel, {"terms": "*fp32", "out": "*fp32", "n": "i32"}, {"CHUNK": _CHUNK}, num_warps=16, note="5 layers"
    ),
    _backward_variant("bf16", "fp32", True, "1 x 512 x 64 x 64, of a style loss; 9.4 MB, 2.1 GFLOP: 2.7 us"),
    _backward_variant("bf16", "bf16", False, "1 x 512 x 64 x 64, channels-last; 2.7 us"),
    _backward_variant("fp16", "fp16", True, "1 x 512 x 64 x 64; 2.7 us"),
    _backward_variant("fp16", "fp32", True, "1 x 512 x 64 x 64, of a style loss, at half the speed; 5.4 us"),
    _backward_variant("fp32", "fp32", True, "1 x 512 x 64 x 64; 2.1 GFLOP without matrix units: 36 us"),
    _backward_variant("fp64", "fp64", True, "1 x 512 x 64 x 64"),
]
