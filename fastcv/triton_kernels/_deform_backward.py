"""The backward pass of deformable convolution, without atomics, so that gradients are the same at every run.

    columns  the gradient of the samples, from which those of offset and mask follow at once (_deform_columns.py)
    input    gathered from columns, by points in the order of the cells that they lie in (_deform_input.py)
    weight   a product of the output's gradient and the samples, made anew (_deform_weight.py)

Channels go in pieces of ``BLOCK_C``, parts of a unit (_deform.py). Columns are kept for a slab of pieces at a time, and
of images where those of a batch are many, to be read while they are in the L2 cache. Operands of products are as in the
forward pass, and columns in the type of sums.

Operations: for the columns 2 * pixels * outputs * depth on the matrix unit, as the forward pass, and about 30 for each
sample outside of it; as many for the weight. Bytes: input, gradient of the output and offsets in, gradients out; 8 for
each point, and columns, 4 for each sample. 2 images of 256 channels, 100 x 136 pixels, to 256 channels with 3 x 3 in
bfloat16: 64 GFLOP, 82 us on an H200 at 790 TFLOP/s; 63 M samples, 2 GFLOP, 31 us at 60 TFLOP/s; 250 MB of columns,
written once and read for each of four pixels, 0.3 ms at 4.3 TB/s from memory, less from the L2 cache. Reasoned, not
measured. Memory beyond the gradients: a slab, 32 MB or the columns of 64 channels of an image, and 40 bytes for each
point.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ._convolution import INTERPRETED, Launch, ceil_div, power_of_2, run, sum_type
from ._deform import (
    MASK_STRIDES,
    NUMBERS,
    Geometry,
    Layout,
    Shape,
    check_floating,
    check_shape,
    check_size,
    example,
    is_wide,
    laid_out,
    layout,
    operand,
    precision,
    strides,
    triton_type,
)
from ._deform_columns import COLUMNS_NUMBERS, deform_conv2d_columns_kernel
from ._deform_input import (
    GATHER_NUMBERS,
    POINTS_NUMBERS,
    deform_conv2d_gather_kernel,
    deform_conv2d_points_kernel,
    sort_points,
)
from ._deform_weight import WEIGHT_NUMBERS, deform_conv2d_weight_kernel
from ._launch import Variant

_INPUT, _WEIGHT, _OFFSET, _MASK, _BIAS = (1 << i for i in range(5))
_PROCESSORS = 4 if INTERPRETED else 132
_SLAB_BYTES = (256 << 10) if INTERPRETED else (32 << 20)
_LEAST_STEPS = 8  # blocks of pixels in a part of the weight's sums
# By the size of an operand: pixels, outputs and channels of a tile of columns; outputs and pixels of a tile of weights.
_TILES = {2: (64, 32, 64, 128, 32), 4: (64, 16, 32, 128, 16), 8: (32, 16, 32, 16, 32)}
_GATHERED = 16  # pixels
if INTERPRETED:  # whose time goes by the number of programs and steps
    _TILES, _GATHERED = dict.fromkeys(_TILES, (512, 256, 64, 256, 1024)), 1024


class Problem(NamedTuple):
    """All but the data: what launches depend on."""

    shape: Shape
    dtype: torch.dtype
    """Of the input."""
    operand: torch.dtype
    precision: str
    input: Layout
    grad: Layout
    offset: tuple[int, ...]
    mask: tuple[int, ...] | None
    channels_last: bool
    """Of the input's gradient, which is dense."""
    wide: bool
    needs: int


class Plan(NamedTuple):
    points: Launch | None
    weight: Launch | None
    splits: int
    """Parts of the weight's sums."""
    slabs: tuple[Launch, ...]
    columns: int
    """Elements of a slab."""


@functools.lru_cache(maxsize=1024)
def plan(p: Problem) -> Plan:
    points = _points_launch(p) if p.needs & _INPUT else None
    weight, splits = _weight_launch(p) if p.needs & _WEIGHT else (None, 0)
    slabs, columns = _slab_launches(p) if p.needs & (_INPUT | _OFFSET | _MASK) else ((), 0)
    return Plan(points, weight, splits, slabs, columns)


def _block_c(p: Problem) -> int:
    return power_of_2(p.shape.unit, 16, _TILES[p.operand.itemsize][2])


def _pieces(p: Problem) -> int:
    """Of a unit."""
    return ceil_div(p.shape.unit, _block_c(p))


def _numbers(p: Problem, names: tuple[str, ...], **others: int) -> dict[str, int]:
    shape, g = p.shape, p.shape.geometry
    numbers = dict(zip(NUMBERS, shape.numbers(), strict=True)) | dict(
        sources=g.offset_groups * shape.taps, outputs=shape.group_outputs // p.grad.vector, groups=g.groups,
        group_units=shape.group_units, unit=shape.unit // p.input.vector, offset_units=shape.offset_units,
    )  # fmt: skip
    for prefix, strides_ in (("stride", p.input.strides), ("grad", p.grad.strides), ("offset", p.offset)):
        numbers |= dict(zip((f"{prefix}_{axis}" for axis in "nchw"), strides_, strict=True))
    numbers |= dict(zip(MASK_STRIDES, p.mask or (0,) * 4, strict=True))
    return {name: others[name] if name in others else numbers[name] for name in names}


def _constants(p: Problem) -> dict[str, object]:
    return dict(
        KERNEL_W=p.shape.kernel_w, TAPS=p.shape.taps, PIECES=_pieces(p), EVEN=p.shape.unit % _block_c(p) == 0,
        VECTOR=p.input.vector, GRAD_VECTOR=p.grad.vector, CHANNELS_LAST=p.input.channels_last,
        GRAD_CHANNELS_LAST=p.grad.channels_last, WIDE=p.wide, OPERAND=triton_type(p.operand), PRECISION=p.precision,
        BLOCK_C=_block_c(p),
    )  # fmt: skip


def _points_launch(p: Problem) -> Launch:
    shape, block = p.shape, 65536 if INTERPRETED else 256
    points = shape.pixels * shape.geometry.offset_groups * shape.taps
    constants = dict(KERNEL_W=shape.kernel_w, TAPS=shape.taps, WIDE=p.wide, BLOCK=block)
    tensors = dict(offset="offset", below="below", right="right", cells="cells")
    numbers = _numbers(p, POINTS_NUMBERS)
    return Launch(deform_conv2d_points_kernel, ceil_div(points, block), tensors, numbers, constants)


def _weight_launch(p: Problem) -> tuple[Launch, int]:
    shape, (_, _, _, o, pixels) = p.shape, _TILES[p.operand.itemsize]
    o, pixels = power_of_2(shape.group_outputs, 16, o), power_of_2(shape.pixels, 16, pixels)
    tiles = ceil_div(shape.group_outputs, o)
    programs = tiles * shape.taps * _pieces(p) * (shape.channels // shape.unit)
    splits = max(1, min(2 * _PROCESSORS // programs, ceil_div(shape.pixels, pixels) // _LEAST_STEPS))
    tensors = dict(grad="grad", input="input", offset="offset", mask=p.mask and "mask", sums="sums")
    numbers = _numbers(p, WEIGHT_NUMBERS, tiles=tiles, splits=splits)
    constants = _constants(p) | dict(BLOCK_O=o, BLOCK_P=pixels)
    return Launch(deform_conv2d_weight_kernel, programs * splits, tensors, numbers, constants, 8), splits


def _slabs(p: Problem) -> tuple[int, int]:
    """Images and pieces of a slab; all where no columns are kept."""
    shape, pieces = p.shape, _pieces(p) * (p.shape.channels // p.shape.unit)
    if not p.needs & _INPUT:
        return shape.images, pieces
    one = shape.taps * shape.out_height * shape.out_width * _block_c(p) * sum_type(p.operand).itemsize
    fit = max(1, _SLAB_BYTES // one)
    return min(fit, shape.images), min(max(1, fit // shape.images), pieces)


def _slab_launches(p: Problem) -> tuple[tuple[Launch, ...], int]:
    shape, launches = p.shape, []
    images, pieces = _slabs(p)
    all_pieces = _pieces(p) * (shape.channels // shape.unit)
    for piece in range(0, all_pieces, pieces):
        for image in range(0, shape.images, images):
            count, end = min(images, shape.images - image), min(piece + pieces, all_pieces)
            launches.append(_columns_launch(p, image, count, piece, end))
            if p.needs & _INPUT:
                launches.append(_gather_launch(p, image, count, piece, end))
    columns = images * pieces * shape.taps * shape.out_height * shape.out_width * _block_c(p)
    return tuple(launches), columns if p.needs & _INPUT else 0


def _columns_launch(p: Problem, image: int, images: int, piece: int, end: int) -> Launch:
    shape, (m, k, *_) = p.shape, _TILES[p.operand.itemsize]
    pixels, of_group = images * shape.out_height * shape.out_width, shape.offset_units * _pieces(p)
    m, k = power_of_2(pixels, 16, m), power_of_2(shape.group_outputs, 16, k)
    programs = ceil_div(pixels, m) * ((end - 1) // of_group + 1 - piece // of_group) * shape.taps
    tensors = dict(grad="grad", weight="weight", input="input", offset="offset", mask=p.mask and "mask")
    for name, need in (("columns", _INPUT), ("grad_offset", _OFFSET), ("grad_mask", _MASK)):
        tensors[name] = name if p.needs & need else None
    numbers = _numbers(p, COLUMNS_NUMBERS, images=images, first_image=image, first_piece=piece, end_piece=end)
    constants = _constants(p) | dict(BLOCK_M=m, BLOCK_K=k)
    return Launch(deform_conv2d_columns_kernel, programs, tensors, numbers, constants, 8)


def _gather_launch(p: Problem, image: int, images: int, piece: int, end: int) -> Launch:
    shape, tiles = p.shape, ceil_div(p.shape.height * p.shape.width, _GATHERED)
    tensors = {name: name for name in ("columns", "below", "right", "order", "starts", "gradient")}
    numbers = _numbers(
        p, GATHER_NUMBERS, images=images, area=shape.out_height * shape.out_width, channels=shape.channels,
        offset_groups=shape.geometry.offset_groups, unit=shape.unit, first_image=image, first_piece=piece, tiles=tiles,
    )  # fmt: skip
    constants = dict(
        TAPS=shape.taps, PIECES=_pieces(p), CHANNELS_LAST=p.channels_last, WIDE=p.wide, BLOCK_P=_GATHERED,
        BLOCK_C=_block_c(p),
    )  # fmt: skip
    return Launch(deform_conv2d_gather_kernel, tiles * images * (end - piece), tensors, numbers, constants)


def deform_conv2d_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
    needs: int = 31,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    geometry = Geometry(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, offset_groups)
    factors = mask if use_mask else None
    shape = check_shape(input, weight, offset, factors, bias, geometry)
    check_size("grad", grad, (shape.images, shape.outputs, shape.out_height, shape.out_width))
    check_floating("grad", grad, input)
    originals = input, weight, offset, mask, bias
    needs &= 31 if use_mask else ~_MASK
    kept = [t if needs >> i & 1 else t.new_empty(0) for i, t in enumerate(originals)]
    if not grad.numel():
        return tuple(torch.zeros_like(t) for t in kept)
    dtype = operand(input, weight, grad)
    of_sums = sum_type(dtype)
    memory_format = torch._prims_common.suggest_memory_format(input)
    gradient = torch.empty_like(input, memory_format=memory_format) if needs & _INPUT else kept[0]
    results = [gradient, *(torch.zeros(t.shape, dtype=of_sums, device=t.device) for t in kept[1:])]
    problem = Problem(
        shape, input.dtype, dtype, precision(dtype), layout(input, shape.unit), layout(grad, shape.group_outputs),
        strides(offset), strides(mask) if use_mask else None, memory_format == torch.channels_last,
        is_wide(shape, input, grad, offset, factors, gradient), needs,
    )  # fmt: skip
    points, of_weight, splits, slabs, columns = plan(problem)
    tensors = dict(grad=grad, input=input, offset=offset, mask=mask, gradient=gradient)
    tensors |= dict(grad_offset=results[2], grad_mask=results[3])
    if of_weight:
        size = splits, shape.outputs, *weight.shape[2:], weight.shape[1]
        sums = torch.empty(size, dtype=of_sums, device=input.device)
        run((of_weight,), tensors | {"sums": sums})
        results[1] = sums.sum(0).permute(0, 3, 1, 2)
    if points:
        sort_points(shape, points, tensors, of_sums)
        tensors["columns"] = torch.empty(columns, dtype=of_sums, device=input.device)
    if slabs:
        run(slabs, tensors | {"weight": laid_out(weight, dtype)})
    if needs & _BIAS and bias.numel():
        results[4] = grad.sum((0, 2, 3), dtype=of_sums)
    return gradient, *(r.to(t.dtype).contiguous() for r, t in zip(results[1:], originals[1:], strict=True))


# ---- compiled ahead ------------------------------------------------------------------------------


def _example(*arguments, mask: bool = True, needs: int = 31, **options) -> Problem:
    """Also the gradient of the output is of the shape of ``example``'s input."""
    shape, input, offset = example(*arguments, **options)
    return Problem(
        shape, input.dtype, input.dtype, precision(input.dtype), layout(input, shape.unit),
        layout(input, shape.group_outputs), strides(offset), strides(offset[:, ::2]) if mask else None,
        layout(input, 1).channels_last, False, needs,
    )  # fmt: skip


def _variant(launch: Launch, p: Problem, note: str) -> Variant:
    of_sums = "fp64" if p.dtype == torch.float64 else "fp32"
    others = dict.fromkeys(("columns", "below", "right", "grad_offset", "grad_mask"), of_sums)
    others |= {"cells": "i32", "order": "i64", "starts": "i32"}
    matrix = "PRECISION" in launch.constants and p.dtype != torch.float64
    return launch.variant(p.dtype, note, matrix, others)


_EXAMPLES = {
    "2 x 256 x 100 x 136 to 256; 32 GFLOP of columns or weights, 41 us": _example(
        torch.bfloat16, 2, 256, 100, 136, 256
    ),
    "the same, contiguous, without mask; 41 us": _example(
        torch.float16, 2, 256, 100, 136, 256, channels_last=False, mask=False, needs=31 & ~_MASK
    ),
    "float32, contiguous, 2 x 256 x 100 x 136 to 256; 0.25 ms of three products each": _example(
        torch.float32, 2, 256, 100, 136, 256, channels_last=False
    ),
    "float64, 2 x 256 x 50 x 68 to 256; 8 GFLOP": _example(torch.float64, 2, 256, 50, 68, 256),
}
_FIRST, *_ = _EXAMPLES.items()
VARIANTS = [
    _variant(launch, problem, note)
    for note, problem in _EXAMPLES.items()
    for launch in (plan(problem).weight, *plan(problem).slabs[:1])
]
VARIANTS += [
    _variant(plan(_FIRST[1]).points, _FIRST[1], "490 000 points; 10 MB, 3 us"),
    _variant(plan(_FIRST[1]).slabs[1], _FIRST[1], "64 channels of an image, 122 000 points; 125 MB, 30 us"),
]
