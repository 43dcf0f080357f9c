"""What the launchers of convolutions share: what is to be computed, plans of launches, checks of arguments."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.conv2d import ACTIVATIONS
from ._launch import Variant, on_device_of

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Problem(NamedTuple):
    """All but the data: what a plan depends on."""

    dtype: torch.dtype
    input: tuple[int, ...]
    """The shape."""
    input_strides: tuple[int, ...]
    out: tuple[int, ...]
    channels_last: bool
    """Of the output, which is dense."""
    residual_strides: tuple[int, ...] | None
    """None: there is none."""
    bias: bool
    size: tuple[int, ...]
    groups: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    activation: str
    slope: float
    tf32: bool
    """Whether float32 operands may be rounded to 11 bits."""

    @property
    def channels(self) -> int:
        """Of a group."""
        return self.input[1] // self.groups

    @property
    def outputs(self) -> int:
        """Of a group."""
        return self.out[1] // self.groups


class Launch(NamedTuple):
    kernel: triton.JITFunction
    programs: int
    tensors: dict[str, str | None]
    """Parameters of the kernel, and which tensor each is: one that ``run`` is given, or ``"sums"``."""
    numbers: dict[str, int]
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3

    def variant(
        self, dtype: torch.dtype, note: str, matrix: bool = False, others: dict[str, str] | None = None
    ) -> Variant:
        """``others``: the types of tensors that have neither ``dtype`` nor, as ``"sums"``, that of sums."""
        names = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
        types: dict[str, str] = dict.fromkeys(self.numbers, "i32")
        for name, tensor in self.tensors.items():
            if tensor is not None:
                own = names[sum_type(dtype) if tensor == "sums" else dtype]
                types[name] = "*" + (others or {}).get(tensor, own)
        nothing: dict[str, object] = {name: None for name, tensor in self.tensors.items() if tensor is None}
        options = dict(num_warps=self.num_warps, num_stages=self.num_stages)
        return Variant(self.kernel, types, self.constants | nothing, matrix=matrix, note=note, **options)


def run(launches: tuple[Launch, ...], tensors: dict[str, Tensor]) -> None:
    with on_device_of(tensors["input"]):
        for kernel, programs, names, numbers, constants, num_warps, num_stages in launches:
            given = {name: None if tensor is None else tensors[tensor] for name, tensor in names.items()}
            kernel[(programs,)](**given, **numbers, **constants, num_warps=num_warps, num_stages=num_stages)


class Plan(NamedTuple):
    """Launches one after the other."""

    launches: tuple[Launch, ...]
    sums: int
    """Elements of the sums between two launches."""

    def run(self, input: Tensor, **tensors: Tensor | None) -> None:
        tensors["input"] = input
        if self.sums:
            tensors["sums"] = torch.empty(self.sums, dtype=sum_type(input.dtype), device=input.device)
        run(self.launches, tensors)


def sum_type(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


# ---- what kernels are told -----------------------------------------------------------------------

RESIDUAL_STRIDES = "residual_n", "residual_c", "residual_h", "residual_w"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int, least: int, most: int) -> int:
    """The least that is not below ``n``, in bounds that are powers of 2."""
    return min(max(triton.next_power_of_2(n), least), most)


def has_neighbours(strides: tuple[int, ...] | None) -> bool:
    """Whether channels lie side by side."""
    return strides is not None and strides[1] == 1


def in_vectors(dtype: torch.dtype, strides: tuple[int, ...] | None, channels: int) -> tuple[int, tuple[int, ...]]:
    """The length of vectors, up to 16 bytes, in which runs of ``channels`` can be read or written, and the strides of
    the tensor, if there is one: in vectors, where it has the channels side by side."""
    lanes = 16 // dtype.itemsize
    if strides is None or not has_neighbours(strides):
        return math.gcd(channels, lanes), strides or (0,) * 4
    vector = math.gcd(channels, lanes, strides[0], *strides[2:])
    return vector, (strides[0] // vector, 1, *(s // vector for s in strides[2:]))


def phase_steps(p: Problem) -> tuple[list[int], list[int]]:
    """For first_tap, of both axes: ``every`` and ``inverse``."""
    common = [math.gcd(s, d) for s, d in zip(p.stride, p.dilation, strict=True)]
    every = [s // g for s, g in zip(p.stride, common, strict=True)]
    return every, [pow(d // g, -1, n) for d, g, n in zip(p.dilation, common, every, strict=True)]


@triton.jit
def in_64_bits(a, b, c, d):
    return a.to(tl.int64), b.to(tl.int64), c.to(tl.int64), d.to(tl.int64)


@triton.jit
def first_tap(phase, size, stride, pad, dilation, every, inverse):
    """Of an axis of a transposed convolution: the first element of the kernel that counts for outputs of a phase, which
    is their position modulo ``stride``; ``size`` where none does. Of those that follow, each ``every``-th counts.

    Elements ``k`` count where ``k * dilation = phase + pad`` modulo ``stride``; ``inverse`` is that of ``dilation``,
    over the common divisor, modulo ``every``.
    """
    common = stride // every
    rest = (phase.to(tl.int64) + pad) % stride
    first = rest // common * inverse % every
    return tl.where((rest % common == 0) & (first < size), first, size).to(tl.int32)


def epilogue_constants(p: Problem) -> dict[str, object]:
    return dict(
        OUT_CHANNELS_LAST=p.channels_last, RESIDUAL_CHANNELS_LAST=has_neighbours(p.residual_strides), WIDE=is_wide(p),
        ACTIVATION=p.activation, SLOPE=p.slope if p.activation == "leaky_relu" else 0.0,
    )  # fmt: skip


def is_wide(p: Problem) -> bool:
    """Whether offsets, or rows and columns with their padding, need 64 bits."""
    sides = (p.out if p.transposed else p.input)[2:]
    axes = zip(sides, p.padding, p.dilation, p.size, p.stride, strict=True)
    reach = [n + 2 * pad + d * (k - 1) + s for n, pad, d, k, s in axes]
    numbers = [*reach, math.prod(p.out), math.prod(p.size) * p.channels * p.out[1]]
    # Taps outside of the input have offsets as well, though nothing is read there.
    for shape, strides in (((*p.input[:2], *reach), p.input_strides), (p.out, p.residual_strides)):
        if strides is not None:
            numbers.append(sum(n * s for n, s in zip(shape, strides, strict=True)))
    return max(numbers) >= 2**31 - 2**20


def is_depthwise(channels: int, outputs: int) -> bool:
    """Whether groups of so many channels and outputs leave a matrix product mostly empty."""
    return channels == 1 and outputs < 8


# ---- from arguments to problems ------------------------------------------------------------------

TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MOST = 2**31 - 1


def check(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(message)


def check_kernel(name: str) -> None:
    wanted = f'kernel: "{name}" does not serve this convolution on CUDA devices, or does not exist; use "auto"'
    check(name == "auto", wanted)


def check_geometry(groups: int, stride: list[int], padding: list[int], dilation: list[int], size: list[int]) -> None:
    check(
        len(stride) == len(padding) == len(dilation) == 2 and min(*stride, *dilation, *size) > 0 <= min(padding),
        "stride, padding, dilation: expected two positive numbers each, of padding zeros as well",
    )
    numbers = (*stride, *padding, *(d * (k - 1) + 1 for d, k in zip(dilation, size, strict=True)))
    check(max(numbers) <= MOST, "stride, padding, dilation: expected numbers, and a reach of the kernel, below 2^31")
    check(0 < groups <= MOST, f"groups: expected a positive number below 2^31, got {groups}")


def make_problem(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, outputs: int, size: list[int],
    groups: int, stride: list[int], padding: list[int], dilation: list[int], out_size: list[int], transposed: bool,
    activation: str, slope: float,
) -> Problem:  # fmt: skip
    """Checks what kernels rely on where they access memory; ``weight`` is laid out for them."""
    check(input.dtype in TYPES, f"input: expected float32, float64, float16 or bfloat16, got {input.dtype}")
    check(
        min(out_size) > 0 and max(out_size) <= MOST,
        f"input: {input.shape[2]} x {input.shape[3]} with its padding is smaller than the kernel, or too large",
    )
    shape = (input.shape[0], outputs, *out_size)
    count = outputs * (input.shape[1] // groups) * math.prod(size)
    check(weight.is_contiguous() and weight.numel() == count, "prepared: expected what was prepared of this weight")
    check(bias is None or bias.shape == (outputs,), f"bias: expected shape [{outputs}]")
    check(residual is None or residual.shape == shape, f"residual: expected the output's shape {list(shape)}")
    for name, t in (("weight", weight), ("bias", bias), ("residual", residual)):
        same = t is None or (t.dtype == input.dtype and t.device == input.device)
        check(same, f"{name}: expected the type and device of input, {input.dtype} and {input.device}")
    check(activation in ACTIVATIONS, f'activation: "{activation}" is unknown')
    last = torch._prims_common.suggest_memory_format(input) == torch.channels_last
    residual_strides = None if residual is None else strides_of(residual)
    return Problem(
        input.dtype, tuple(input.shape), strides_of(input), shape, last, residual_strides, bias is not None,
        tuple(size), groups, tuple(stride), tuple(padding), tuple(dilation), transposed, activation, slope,
        allows_tf32(input),
    )  # fmt: skip


def allows_tf32(input: Tensor) -> bool:
    return input.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def strides_of(t: Tensor) -> tuple[int, ...]:
    """Zero where a dimension has one element, whose stride means nothing."""
    return tuple(s if n > 1 else 0 for s, n in zip(t.stride(), t.shape, strict=True))


def empty_output(p: Problem, input: Tensor) -> Tensor:
    memory_format = torch.channels_last if p.channels_last else torch.contiguous_format
    return torch.empty(p.out, dtype=p.dtype, device=input.device, memory_format=memory_format)


def example(
    dtype: torch.dtype, images: int, channels: int, height: int, width: int, outputs: int, size: int, *,
    stride: int = 1, padding: int = 0, groups: int = 1, channels_last: bool = True, residual: bool = False,
    activation: str = "relu", transposed: bool = False,
) -> Problem:  # fmt: skip
    """With a bias, and dense maps."""

    def strides(c: int, h: int, w: int) -> tuple[int, ...]:
        return (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)

    if transposed:
        sides = [(n - 1) * stride - 2 * padding + size for n in (height, width)]
    else:
        sides = [(n + 2 * padding - size) // stride + 1 for n in (height, width)]
    return Problem(
        dtype, (images, channels, height, width), strides(channels, height, width), (images, outputs, *sides),
        channels_last, strides(outputs, *sides) if residual else None, True, (size, size), groups, (stride, stride),
        (padding, padding), (1, 1), transposed, activation, 0.01, False,
    )  # fmt: skip
