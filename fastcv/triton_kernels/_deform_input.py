"""The gradient of deformable convolution's input: points sorted by cell, and pixels that gather from them.

A cell is what lies between four pixels, with the number of the upper left one. A pixel's gradient is the sum over the
points of the four cells around it, in their order; those of two cells side by side follow each other. Points are where
kernel elements sample at each pixel of the output, numbered as [images, offset groups, taps, pixels]. Operations, bytes
and floor: _deform_backward.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._convolution import Launch, in_64_bits, run
from ._deform import NUMBERS, OFFSET_STRIDES, Shape, locate

POINTS_NUMBERS = (*NUMBERS, "sources", *OFFSET_STRIDES)


@triton.jit(do_not_specialize=POINTS_NUMBERS)
def deform_conv2d_points_kernel(
    offset, below, right, cells,
    images, height, width, out_height, out_width, step_h, step_w, pad_h, pad_w, dilation_h, dilation_w,
    sources, offset_n, offset_c, offset_h, offset_w,
    KERNEL_W: tl.constexpr, TAPS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each point, [images, sources, pixels]: how far below and right of a pixel it is, and the pixel's number among
    those of all images and offset groups, with a row and a column before the first. Points outside have the last."""
    i = (tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    if WIDE:
        offset_n, offset_c, offset_h, offset_w = in_64_bits(offset_n, offset_c, offset_h, offset_w)
    area = out_height * out_width
    present = i // area < images * sources
    row, column, source, image = i // out_width % out_height, i % out_width, i // area % sources, i // area // sources
    tap = source % TAPS
    y, x, down, along = locate(
        offset + image * offset_n + 2 * source * offset_c + row * offset_h + column * offset_w, offset_c,
        row * step_h - pad_h + tap // KERNEL_W * dilation_h, column * step_w - pad_w + tap % KERNEL_W * dilation_w,
        height, width, present, below.dtype.element_ty,
    )  # fmt: skip
    tl.store(below + i, down, mask=present)
    tl.store(right + i, along, mask=present)
    read = (y >= -1) & (y < height) & (x >= -1) & (x < width)
    rows = (height + 1).to(cells.dtype.element_ty)
    cell = ((i // area // TAPS) * rows + y + 1) * (width + 1) + x + 1
    tl.store(cells + i, tl.where(read, cell, images * (sources // TAPS) * rows * (width + 1)), mask=present)


GATHER_NUMBERS = (
    *("images", "height", "width", "area", "channels", "offset_groups", "unit", "offset_units"),
    *("first_image", "first_piece", "tiles"),
)


@triton.jit(do_not_specialize=GATHER_NUMBERS)
def deform_conv2d_gather_kernel(
    columns, below, right, order, starts, gradient,
    images, height, width, area, channels, offset_groups, unit, offset_units, first_image, first_piece, tiles,
    TAPS: tl.constexpr, PIECES: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_P pixels of an image of the slab, for a piece; ``area`` is that of the output."""
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    if WIDE:
        height, area = height.to(tl.int64), area.to(tl.int64)
    image, piece = program // tiles % images, first_piece + program // tiles // images
    group = (first_image + image) * offset_groups + piece // PIECES // offset_units
    place = program % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    present, y, x = place < height * width, place // width, place % width
    c = tl.arange(0, BLOCK_C)
    # Points are numbered through all images and offset groups, columns from the first of the slab on.
    first = group.to(tl.int64) * TAPS * area
    columns += ((piece - first_piece) * images + image) * TAPS * area * BLOCK_C + c[None, :]
    sums = tl.zeros([BLOCK_P, BLOCK_C], columns.dtype.element_ty)
    for lower in tl.static_range(2):
        cell = (group * (height + 1) + y + lower) * (width + 1) + x
        start, middle = tl.load(starts + cell, mask=present, other=0), tl.load(starts + cell + 1, mask=present, other=0)
        end = tl.load(starts + cell + 2, mask=present, other=0)
        for i in range(tl.max(end - start)):
            at = start + i
            has = at < end
            point = tl.load(order + at, mask=has, other=0)
            down, along = tl.load(below + point, mask=has, other=0.0), tl.load(right + point, mask=has, other=0.0)
            weight = (1 - down if lower else down) * tl.where(at < middle, along, 1 - along)
            value = tl.load(columns + (point - first)[:, None] * BLOCK_C, mask=has[:, None], other=0.0)
            sums += weight[:, None] * value
    unit_channel = piece % PIECES * BLOCK_C + c
    channel, image = piece // PIECES * unit + unit_channel, first_image + image
    wanted = present[:, None] & (unit_channel < unit)[None, :]
    if CHANNELS_LAST:
        to = (image * height * width + place)[:, None] * channels + channel[None, :]
    else:
        to = ((image * channels + channel) * height * width)[None, :] + place[:, None]
    tl.store(gradient + to, sums.to(gradient.dtype.element_ty), mask=wanted)


def sort_points(shape: Shape, launch: Launch, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Adds to the tensors how far points are below and right of a pixel, their order by cell, and where cells start."""
    like = dict(device=tensors["input"].device)
    points = shape.pixels * shape.geometry.offset_groups * shape.taps
    all_cells = shape.images * shape.geometry.offset_groups * (shape.height + 1) * (shape.width + 1)
    narrow = max(points, all_cells) < 2**31 - 1
    cells = torch.empty(points, dtype=torch.int32 if narrow else torch.int64, **like)
    for name in ("below", "right"):
        tensors[name] = torch.empty(points, dtype=dtype, **like)
    run((launch,), tensors | {"cells": cells})
    cells, tensors["order"] = cells.sort(stable=True)
    numbers = torch.arange(all_cells + 1, dtype=cells.dtype, **like)
    tensors["starts"] = torch.searchsorted(cells, numbers, out_int32=narrow)
