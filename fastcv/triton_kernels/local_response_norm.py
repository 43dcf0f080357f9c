"""Local response normalisation and its gradient.

A program takes some channels of some positions, vectors of whichever lie densely. Windows are summed anew for each
element: a running sum would keep what has left it, infinities for ever. The neighbours are read again from the
first-level cache, as windows are of five channels or so; what all windows of a block share is summed once where they
are wide.

Backward, dL/dx_i = g_i r_i - 2 factor beta x_i (sum of u_c over those c whose window has i), with d = k + factor *
(the sum of a window's squares), r = d^-beta, u_c = g_c x_c r_c / d_c. A program takes all channels of its positions:
first it writes u to memory, then it sums what it has written, which is still in the caches.

32 x 96 x 55 x 55 (AlexNet) in float32: 37 MB in and out, floor 17 us on an H200; backward 56 MB read or written at
least, 26 us, and 37 MB of u, which leave the caches later if at all. Operations: 20 an element, 3 us.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant, on_device_of

_BLOCK = 4096  # elements of a program, 8 to a thread


@triton.jit
def _power(d, beta, EXPONENT: tl.constexpr):
    """``d ** -beta``."""
    if EXPONENT == "3/4":
        root = tl.rsqrt(d)
        return root * tl.sqrt(root)
    elif EXPONENT == "1/2":
        return tl.rsqrt(d)
    elif EXPONENT == "1":
        return 1 / d
    elif EXPONENT == "0":
        return tl.full(d.shape, 1, d.dtype)
    else:
        size = d if EXPONENT == "any" else tl.abs(d)
        power = tl.exp2(-tl.full((), beta, d.dtype) * tl.log2(size))
        return tl.where(d < 0, -power, power) if EXPONENT == "odd" else power


@triton.jit
def _values(x, c, low, high, stride, inside, SQUARES: tl.constexpr, SUMS: tl.constexpr):
    """Of channels c from ``low`` to ``high``, 0 for others."""
    mask = ((c >= low) & (c < high))[:, None] & inside
    value = tl.load(x + (c.to(tl.int64) * stride)[:, None], mask=mask, other=0).to(SUMS)
    return value * value if SQUARES else value


@triton.jit
def _window_sum(
    x, first, channels, stride, inside, before, after,
    SQUARES: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Of the channels from ``c - before`` to ``c + after`` for each channel c of a block. ``x``: those of channel 0."""
    c = first + tl.arange(0, CHANNELS)
    last = tl.minimum(first + CHANNELS, channels) - 1
    sums = tl.zeros((CHANNELS, POSITIONS), SUMS)
    low = channels
    if WIDE:  # channels from low to high are in all windows
        low = tl.maximum(0, last - before)
        high = tl.maximum(low, tl.minimum(channels, first + after + 1))
        shared = tl.zeros((POSITIONS,), SUMS)
        for start in range(low, high, CHANNELS):
            shared += tl.sum(_values(x, start + tl.arange(0, CHANNELS), 0, high, stride, inside, SQUARES, SUMS), 0)
        sums += shared[None, :]
        if high < channels:
            for j in range(high - last, tl.minimum(after, channels - 1 - first) + 1):
                sums += _values(x, c + j, high, channels, stride, inside, SQUARES, SUMS)
    if low > 0:
        for j in range(tl.maximum(-before, -last), tl.minimum(after, low - 1 - first) + 1):
            sums += _values(x, c + j, 0, low, stride, inside, SQUARES, SUMS)
    return sums


@triton.jit
def _norm_kernel(
    input, out, channels, positions, stride_n, stride_c, stride_p, out_n, out_c, out_p, before, after,
    channel_blocks, position_blocks, factor: tl.float64, beta: tl.float64, k: tl.float64,
    EXPONENT: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    SUMS: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    image = (program // channel_blocks // position_blocks).to(tl.int64)
    first = program % channel_blocks * CHANNELS
    p = (program // channel_blocks % position_blocks).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    inside = (p < positions)[None, :]
    x = input + image * stride_n + (p * stride_p)[None, :]
    squares = _window_sum(x, first, channels, stride_c, inside, before, after, True, WIDE, CHANNELS, POSITIONS, SUMS)
    d = tl.full((), k, SUMS) + tl.full((), factor, SUMS) * squares
    c = first + tl.arange(0, CHANNELS)
    value = _values(x, c, 0, channels, stride_c, inside, False, SUMS) * _power(d, beta, EXPONENT)
    at = out + image * out_n + (c.to(tl.int64) * out_c)[:, None] + (p * out_p)[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=(c < channels)[:, None] & inside)


@triton.jit
def _norm_backward_kernel(
    grad, input, ratio, out, channels, positions, grad_n, grad_c, grad_p, stride_n, stride_c, stride_p,
    out_n, out_c, out_p, before, after, position_blocks, factor: tl.float64, beta: tl.float64, k: tl.float64,
    EXPONENT: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """``ratio``: scratch memory for u, of the layout of ``out``."""
    SUMS: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    image = (tl.program_id(0) // position_blocks).to(tl.int64)
    p = (tl.program_id(0) % position_blocks).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    inside = (p < positions)[None, :]
    g = grad + image * grad_n + (p * grad_p)[None, :]
    x = input + image * stride_n + (p * stride_p)[None, :]
    u = ratio + image * out_n + (p * out_p)[None, :]
    y = out + image * out_n + (p * out_p)[None, :]
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        sums = _window_sum(x, first, channels, stride_c, inside, before, after, True, WIDE, CHANNELS, POSITIONS, SUMS)
        d = tl.full((), k, SUMS) + tl.full((), factor, SUMS) * sums
        value = _values(g, c, 0, channels, grad_c, inside, False, SUMS) * _power(d, beta, EXPONENT)
        value = value * _values(x, c, 0, channels, stride_c, inside, False, SUMS) / d
        tl.store(u + (c.to(tl.int64) * out_c)[:, None], value, mask=(c < channels)[:, None] & inside)
    tl.debug_barrier()  # the program's threads read what its others wrote
    for first in range(0, channels, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        sums = _window_sum(x, first, channels, stride_c, inside, before, after, True, WIDE, CHANNELS, POSITIONS, SUMS)
        d = tl.full((), k, SUMS) + tl.full((), factor, SUMS) * sums
        value = _values(g, c, 0, channels, grad_c, inside, False, SUMS) * _power(d, beta, EXPONENT)
        sums = _window_sum(u, first, channels, out_c, inside, after, before, False, WIDE, CHANNELS, POSITIONS, SUMS)
        slope = -2 * tl.full((), factor, SUMS) * tl.full((), beta, SUMS)
        value += slope * _values(x, c, 0, channels, stride_c, inside, False, SUMS) * sums
        tl.store(
            y + (c.to(tl.int64) * out_c)[:, None],
            value.to(out.dtype.element_ty),
            mask=(c < channels)[:, None] & inside,
        )


# ---- launchers ---------------------------------------------------------------------------------------


def _exponent(beta: float) -> str:
    """Those with a formula; whether ``d ** -beta`` of a negative d is positive, negative or NaN."""
    named = {0.75: "3/4", 0.5: "1/2", 1.0: "1", 0.0: "0"}.get(beta)
    return named or ("any" if beta % 1 else "odd" if beta % 2 else "even")


def _blocks(channels: int, positions: int, channels_last: bool) -> tuple[int, int]:
    """Channels and positions of a block: up to 128 of what lies densely, then of the other, then of the first again."""
    dense, other = (triton.next_power_of_2(n) for n in (positions, channels))
    if channels_last:
        dense, other = other, dense
    across = min(other, _BLOCK // min(dense, 128))
    along = min(dense, _BLOCK // across)
    return (along, across) if channels_last else (across, along)


def _run(input: Tensor, grad: Tensor | None, size: int, alpha: float, beta: float, k: float) -> Tensor:
    if size < 1:
        raise RuntimeError(f"size: expected at least 1, got {size}")
    memory_format = torch._prims_common.suggest_memory_format(input)
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=memory_format)
    if out.numel() == 0:
        return out
    x, y = input.flatten(2), out.flatten(2)  # a copy only of views whose positions lie unevenly
    images, channels, positions = x.shape
    before, after = min(channels, size // 2), min(channels, (size - 1) // 2)
    block = _blocks(channels, positions, memory_format == torch.channels_last)
    constants = dict(EXPONENT=_exponent(beta), WIDE=before + after + 1 > 2 * min(channels, block[0]))
    constants |= dict(CHANNELS=block[0], POSITIONS=block[1], num_warps=max(1, block[0] * block[1] // 256))
    numbers = alpha / size, beta, k
    blocks = triton.cdiv(channels, block[0]), triton.cdiv(positions, block[1])
    with on_device_of(x):
        if grad is None:
            _norm_kernel[(images * blocks[0] * blocks[1],)](
                x, y, channels, positions, *x.stride(), *y.stride(), before, after, *blocks, *numbers, **constants
            )
        else:
            g = grad.flatten(2)
            ratio = torch.empty_like(y, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
            _norm_backward_kernel[(images * blocks[1],)](
                g, x, ratio, y, channels, positions, *g.stride(), *x.stride(), *y.stride(), before, after, blocks[1],
                *numbers, **constants,
            )  # fmt: skip
    return out


def local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return _run(input, None, size, alpha, beta, k)


def local_response_norm_backward(grad: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    if grad.shape != input.shape or grad.dtype != input.dtype:
        raise RuntimeError(f"grad: expected the shape of input and its dtype, got {list(grad.shape)}, {grad.dtype}")
    return _run(input, grad, size, alpha, beta, k)


# ---- compiled ahead ------------------------------------------------------------------------------------


def _variant(kernel: triton.JITFunction, dtype: str, channels_last: bool, note: str, **constants) -> Variant:
    """Of 96 channels; contiguous or channels-last."""
    channels, positions = _blocks(96, 55 * 55, channels_last)
    constants = {"EXPONENT": "3/4", "WIDE": False, "CHANNELS": channels, "POSITIONS": positions} | constants
    constants |= {f"{name}_{'c' if channels_last else 'p'}": 1 for name in ("stride", "out", "grad")}
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("factor", "beta", "k"), "fp64")
    types |= dict.fromkeys(("input", "grad", "out"), f"*{dtype}")
    types["ratio"] = "*fp64" if dtype == "fp64" else "*fp32"
    types = {name: types[name] for name in kernel.arg_names if name not in constants}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return Variant(kernel, types, constants, ("channels",), num_warps=16, note=note)


VARIANTS = [
    _variant(_norm_kernel, "fp32", False, "32 x 96 x 55 x 55, size 5; 74 MB: 17 us"),
    _variant(_norm_kernel, "bf16", True, "32 x 96 x 55 x 55, size 5, channels-last; 37 MB: 9 us"),
    _variant(_norm_kernel, "fp16", False, "a power that has no formula", EXPONENT="any"),
    _variant(_norm_kernel, "fp64", False, "a window of all channels", EXPONENT="any", WIDE=True),
    _variant(_norm_backward_kernel, "fp32", False, "32 x 96 x 55 x 55, size 5; 112 MB: 26 us"),
    _variant(_norm_backward_kernel, "bf16", True, "32 x 96 x 55 x 55, size 5, channels-last; 56 MB: 13 us"),
    _variant(_norm_backward_kernel, "fp64", False, "a power that has no formula", EXPONENT="any"),
]
