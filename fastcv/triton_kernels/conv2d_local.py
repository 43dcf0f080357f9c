"""Locally connected layers: at every output pixel a matrix of its own times the patches of all images.

Each of the three operators is a product, in tiles of one pixel, over the depth of which a program sums in registers:

    output[n, k]   = sum over d of patch[n, d] weight[k, d]      d: channel and kernel element, as weights lie
    gradient[k, d] = sum over n of grad[n, k] patch[n, d]        of the weights
    rows[n, j]     = sum over kh, k of grad[n, k] weight[k, j]   j: channel and column of the kernel

The gradient of the input at a pixel is a sum over kernel elements, of weights of as many output pixels. ``rows`` has it
summed over the kernel's rows already, for each row of the input and column of the output; so weights are read in runs
of a kernel's row, and a second kernel adds ``KW`` of those sums for each pixel, in one order. They take ``KW`` times
the input's memory in float32.

From 16 images on tiles go through the matrix unit, and maps are copied so that images lie side by side: a patch is
elements of many rows, of each of which 32 bytes would be read. float32 is as in ``_implicit_gemm.py``, three products
of parts of 11 bits: as exact as float32 sums are (but infinite operands may give NaN). With fewer images sums are
taken of products, element by element.

Bytes: each weight once, for all images; the maps are less. DeepFace's layer L5, 16 to 16 channels, 9 x 9 on 63 x 63,
to 55 x 55 in float32: 251 MB, 58 us on an H200 (4.3 TB/s); for 64 images 8 GFLOP, 62 us at 130 TFLOP/s of such
products, or for one image 2 us at 60. Patches come from the L2 cache, 4 bytes an image and weight of an output: where
images are more than outputs, that takes longest. Reasoned, not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._convolution import INTERPRETED, ceil_div, check, check_geometry, power_of_2
from ._launch import Variant, on_device_of

_MATRIX_IMAGES = 16  # the least that the matrix unit takes
_STAGES = 2  # of loads: there are other programs to wait for; with more, registers are spilled
_MOST = 2**31 - 2**16  # elements along a tile's axis: the last block may end beyond


@triton.jit
def _axes(row, depth, column, PRECISION: tl.constexpr):
    """Indices that broadcast to the operands: the left one's rows and depth, the right one's depth and columns.

    Off the matrix unit, products are a block [rows, depth, columns].
    """
    if PRECISION == "products":
        return row[:, None, None], depth[None, :, None], depth[None, :, None], column[None, None, :]
    else:
        return row[:, None], depth[None, :], depth[:, None], column[None, :]


@triton.jit
def _no_sums(
    SUM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr
):
    if PRECISION == "products":
        return tl.zeros([ROWS, DEPTH, COLUMNS], SUM)
    else:
        return tl.zeros([ROWS, COLUMNS], SUM)


@triton.jit
def _add_product(sums, a, b, PRECISION: tl.constexpr):
    if PRECISION == "products":
        return sums + a.to(sums.dtype) * b.to(sums.dtype)
    elif PRECISION == "tf32x3":
        # Not an addition: the compiler would have the matrix unit add to the sums, which truncates.
        return tl.fma(tl.dot(a, b, input_precision="tf32x3"), 1.0, sums)
    else:
        if INTERPRETED and a.dtype == tl.bfloat16:  # for which it has no arithmetic
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, sums, input_precision="ieee", out_dtype=sums.dtype)


@triton.jit
def _store(out, sums, row, column, stride_row, stride_column, rows, columns, PRECISION: tl.constexpr):
    if PRECISION == "products":
        sums = tl.sum(sums, 1)
    at = out + row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    tl.store(at, sums.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def _patch(
    d, depth, top, left, height, width, stride_c, stride_y, stride_x, dilation_h, dilation_w, KH: tl.constexpr,
    KW: tl.constexpr,
):  # fmt: skip
    """Where elements d of a patch lie in their image, and which of them do."""
    c, tap = d // (KH * KW), d % (KH * KW)
    y, x = top + tap // KW * dilation_h, left + tap % KW * dilation_w
    inside = (d < depth) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return c.to(tl.int64) * stride_c + y * stride_y + x * stride_x, inside


@triton.jit
def _conv2d_local_kernel(
    input, weight, output, images, outputs, depth, height, width, out_width, stride_n, stride_c, stride_y, stride_x,
    out_n, out_c, out_y, out_x, step_h, step_w, pad_h, pad_w, dilation_h, dilation_w, row_blocks, column_blocks,
    KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)  # programs of the same weights run one after the other
    p = (program // row_blocks // column_blocks).to(tl.int64)
    n = program % row_blocks * ROWS + tl.arange(0, ROWS)
    k = program // row_blocks % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    row, left_d, right_d, column = _axes(n, tl.arange(0, DEPTH), k, PRECISION)
    oy, ox = p // out_width, p % out_width
    top, left = oy * step_h - pad_h, ox * step_w - pad_w
    x = input + row.to(tl.int64) * stride_n
    w = weight + (p * outputs + column) * depth + right_d
    sums = _no_sums(SUM, ROWS, DEPTH, COLUMNS, PRECISION)
    for first in range(0, depth, DEPTH):
        offset, inside = _patch(
            first + left_d, depth, top, left, height, width, stride_c, stride_y, stride_x, dilation_h, dilation_w,
            KH, KW,
        )  # fmt: skip
        a = tl.load(x + offset, mask=inside & (row < images), other=0)
        b = tl.load(w + first, mask=(first + right_d < depth) & (column < outputs), other=0)
        sums = _add_product(sums, a, b, PRECISION)
    _store(output + oy * out_y + ox * out_x, sums, n, k, out_n, out_c, images, outputs, PRECISION)


@triton.jit
def _weight_gradient_kernel(
    grad, input, gradient, images, outputs, depth, height, width, out_width, grad_n, grad_c, grad_y, grad_x,
    stride_n, stride_c, stride_y, stride_x, step_h, step_w, pad_h, pad_w, dilation_h, dilation_w, row_blocks,
    column_blocks, KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    p = (program // row_blocks // column_blocks).to(tl.int64)
    k = program % row_blocks * ROWS + tl.arange(0, ROWS)
    d = program // row_blocks % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    row, left_n, right_n, column = _axes(k, tl.arange(0, DEPTH), d, PRECISION)
    oy, ox = p // out_width, p % out_width
    offset, inside = _patch(
        column, depth, oy * step_h - pad_h, ox * step_w - pad_w, height, width, stride_c, stride_y, stride_x,
        dilation_h, dilation_w, KH, KW,
    )  # fmt: skip
    g = grad + oy * grad_y + ox * grad_x + row.to(tl.int64) * grad_c
    sums = _no_sums(SUM, ROWS, DEPTH, COLUMNS, PRECISION)
    for first in range(0, images, DEPTH):
        a = tl.load(
            g + (first + left_n).to(tl.int64) * grad_n, mask=(first + left_n < images) & (row < outputs), other=0
        )
        b = tl.load(
            input + (first + right_n).to(tl.int64) * stride_n + offset, mask=(first + right_n < images) & inside,
            other=0,
        )  # fmt: skip
        sums = _add_product(sums, a, b, PRECISION)
    _store(gradient + p * outputs * depth, sums, k, d, depth, 1, outputs, depth, PRECISION)


@triton.jit
def _row_gradient_kernel(
    grad, weight, rows, images, outputs, runs, depth, out_height, out_width, grad_n, grad_c, grad_y, grad_x, step_h,
    pad_h, dilation_h, row_blocks, column_blocks, KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``rows``: [rows of the input, columns of the output, runs, images], where ``runs`` are channels times ``KW``."""
    SUM: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    place = (program // row_blocks // column_blocks).to(tl.int64)
    n = program % row_blocks * ROWS + tl.arange(0, ROWS)
    j = program // row_blocks % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    row, left_k, right_k, column = _axes(n, tl.arange(0, DEPTH), j, PRECISION)
    y, ox = place // out_width, place % out_width
    g = grad + row.to(tl.int64) * grad_n + ox * grad_x
    w = weight + (column // KW).to(tl.int64) * (KH * KW) + column % KW
    blocks = tl.cdiv(outputs, DEPTH)
    sums = _no_sums(SUM, ROWS, DEPTH, COLUMNS, PRECISION)
    for i in range(KH * blocks):
        kh, first = i // blocks, i % blocks * DEPTH
        reached = y + pad_h - kh.to(tl.int64) * dilation_h
        oy = reached // step_h
        exists = (reached >= 0) & (reached % step_h == 0) & (oy < out_height)
        k = (first + left_k).to(tl.int64)
        a = tl.load(g + oy * grad_y + k * grad_c, mask=exists & (k < outputs) & (row < images), other=0)
        k = (first + right_k).to(tl.int64)
        at = ((oy * out_width + ox) * outputs + k) * depth + kh * KW
        b = tl.load(w + at, mask=exists & (k < outputs) & (column < runs), other=0)
        sums = _add_product(sums, a, b, PRECISION)
    _store(rows + place * runs * images, sums, n, j, 1, images, images, runs, PRECISION)


@triton.jit
def _fold_rows_kernel(
    rows, gradient, images, channels, width, out_width, stride_n, stride_c, stride_y, stride_x, step_w, pad_w,
    dilation_w, blocks, KW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    y, x = place // width, place % width
    element = block * BLOCK + tl.arange(0, BLOCK)
    mask = element < channels * images
    c, n = (element // images).to(tl.int64), (element % images).to(tl.int64)
    sums = tl.zeros([BLOCK], rows.dtype.element_ty)
    for kw in range(KW):
        reached = x + pad_w - tl.full((), kw, tl.int64) * dilation_w
        ox = reached // step_w
        exists = (reached >= 0) & (reached % step_w == 0) & (ox < out_width)
        run = ((y * out_width + ox) * channels + c) * KW + kw
        sums += tl.load(rows + run * images + n, mask=mask & exists, other=0)
    at = gradient + n * stride_n + c * stride_c + y * stride_y + x * stride_x
    tl.store(at, sums.to(gradient.dtype.element_ty), mask=mask)


# ---- launchers -----------------------------------------------------------------------------------


def _precision(images: int, dtype: torch.dtype) -> str:
    if images < _MATRIX_IMAGES:
        return "products"
    return "tf32x3" if dtype == torch.float32 else "ieee"


def _matrix_tile(rows: int, depth: int, columns: int, itemsize: int) -> dict[str, int]:
    most = 16 if INTERPRETED else 64  # several of the tests' small shapes
    sizes = (rows, most), (depth, 32 if itemsize == 2 else 16), (columns, most)
    return dict(zip(("ROWS", "DEPTH", "COLUMNS"), (power_of_2(n, 16, m) for n, m in sizes), strict=True))


def _tile_of_products(itemsize: int, **sizes: int) -> dict[str, int]:
    """Of 16 or 32 sums for each thread: all of the first axis, 128 of the second, and of the third what is left."""
    left, block = (1 << 16 if INTERPRETED else 4096 if itemsize < 8 else 2048), {}
    for (axis, size), most in zip(sizes.items(), (left, 64 if INTERPRETED else 128, left), strict=True):
        block[axis] = power_of_2(size, 1, min(left, most))
        left //= block[axis]
    return block


def _side_by_side(x: Tensor, matrix: bool) -> Tensor:
    """With images next to each other in memory."""
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) if matrix else x


def _map(like: Tensor, shape: tuple[int, ...], matrix: bool) -> Tensor:
    """To be written, and then by ``_finished`` given the memory format of another map."""
    if matrix:
        return like.new_empty(*shape[1:], shape[0]).permute(3, 0, 1, 2)
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch._prims_common.suggest_memory_format(like)
    )


def _finished(result: Tensor, like: Tensor) -> Tensor:
    return result.contiguous(memory_format=torch._prims_common.suggest_memory_format(like))


def _check(input, output, weight, geometry) -> None:
    """Shapes of the input, the output and the weights; geometry: stride, padding, dilation."""
    check(len(input) == len(output) == 4, "input, grad: expected shapes [N, C, H, W], [N, K, OH, OW]")
    check(len(weight) == 6, f"weight: expected shape [OH, OW, K, C, KH, KW], got {list(weight)}")
    check_geometry(1, *geometry, list(weight[4:]))
    axes = zip(input[2:], weight[4:], *geometry, strict=True)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]
    wanted = [*size, output[1], input[1], *weight[4:]]
    check(min(size) > 0 and list(weight) == wanted, f"weight: expected shape {wanted}, got {list(weight)}")
    wanted = [input[0], weight[2], *size]
    check(list(output) == wanted, f"grad: expected shape {wanted}, got {list(output)}")
    most = max(*input, *output, input[0] * input[1], input[1] * weight[4] * weight[5])
    check(most < _MOST, f"weight, input: expected fewer than 2^31 elements along an axis of a product, got {most}")


def _check_type(name: str, x: Tensor, other: Tensor) -> None:
    check(x.dtype == other.dtype, f"{name}: expected the dtype of the other tensor, {other.dtype}, got {x.dtype}")


def conv2d_local(input, weight, stride, padding, dilation):
    _check_type("weight", weight, input)
    check(input.dim() == 4 and weight.dim() == 6, "weight: expected shape [OH, OW, K, C, KH, KW]")
    out_height, out_width, outputs, channels, kh, kw = weight.shape
    images, depth = input.shape[0], channels * kh * kw
    shape = images, outputs, out_height, out_width
    _check(input.shape, shape, weight.shape, (stride, padding, dilation))
    matrix = images >= _MATRIX_IMAGES
    x, output = _side_by_side(input, matrix), _map(input, shape, matrix)
    if output.numel() == 0:
        return _finished(output, input)
    if matrix:
        tile = _matrix_tile(images, depth, outputs, input.element_size())
    else:
        tile = _tile_of_products(input.element_size(), ROWS=images, DEPTH=depth, COLUMNS=outputs)
    blocks = ceil_div(images, tile["ROWS"]), ceil_div(outputs, tile["COLUMNS"])
    with on_device_of(input):
        _conv2d_local_kernel[(out_height * out_width * blocks[0] * blocks[1],)](
            x, weight.contiguous(), output, images, outputs, depth, *input.shape[2:], out_width, *x.stride(),
            *output.stride(), *stride, *padding, *dilation, *blocks, KH=kh, KW=kw,
            PRECISION=_precision(images, input.dtype), num_stages=_STAGES, **tile,
        )  # fmt: skip
    return _finished(output, input)


def conv2d_local_weight_backward(grad, input, kernel_size, stride, padding, dilation):
    _check_type("input", input, grad)
    check(grad.dim() == 4 and input.dim() == 4 and len(kernel_size) == 2, "kernel_size: expected two numbers")
    images, outputs, out_height, out_width = grad.shape
    shape = out_height, out_width, outputs, input.shape[1], *kernel_size
    _check(input.shape, grad.shape, shape, (stride, padding, dilation))
    gradient = grad.new_empty(shape)
    if gradient.numel() == 0 or images == 0:
        return gradient.zero_()
    depth, matrix = gradient[0, 0, 0].numel(), images >= _MATRIX_IMAGES
    g, x = _side_by_side(grad, matrix), _side_by_side(input, matrix)
    if matrix:
        tile = _matrix_tile(outputs, images, depth, grad.element_size())
    else:
        tile = _tile_of_products(grad.element_size(), DEPTH=1, COLUMNS=depth, ROWS=outputs)
    blocks = ceil_div(outputs, tile["ROWS"]), ceil_div(depth, tile["COLUMNS"])
    with on_device_of(grad):
        _weight_gradient_kernel[(out_height * out_width * blocks[0] * blocks[1],)](
            g, x, gradient, images, outputs, depth, *input.shape[2:], out_width, *g.stride(), *x.stride(), *stride,
            *padding, *dilation, *blocks, KH=kernel_size[0], KW=kernel_size[1],
            PRECISION=_precision(images, grad.dtype), num_stages=_STAGES, **tile,
        )  # fmt: skip
    return gradient


def conv2d_local_input_backward(grad, weight, input_size, stride, padding, dilation):
    _check_type("weight", weight, grad)
    wanted = "grad, weight, input_size: expected shapes [N, K, OH, OW], [OH, OW, K, C, KH, KW] and two numbers"
    check(grad.dim() == 4 and weight.dim() == 6 and len(input_size) == 2, wanted)
    out_height, out_width, outputs, channels, kh, kw = weight.shape
    images, (height, width) = grad.shape[0], input_size
    shape = images, channels, height, width
    _check(shape, grad.shape, weight.shape, (stride, padding, dilation))
    matrix, runs = images >= _MATRIX_IMAGES, channels * kw
    g, gradient = _side_by_side(grad, matrix), _map(grad, shape, matrix)
    if gradient.numel() == 0:
        return _finished(gradient, grad)
    sums = torch.float64 if grad.dtype == torch.float64 else torch.float32
    rows = torch.empty((height, out_width, runs, images), dtype=sums, device=grad.device)
    if matrix:
        tile = _matrix_tile(images, outputs, runs, grad.element_size())
    else:
        tile = _tile_of_products(grad.element_size(), ROWS=images, COLUMNS=runs, DEPTH=outputs)
    blocks = ceil_div(images, tile["ROWS"]), ceil_div(runs, tile["COLUMNS"])
    block = power_of_2(channels * images, 1, 1024)
    fold_blocks = ceil_div(channels * images, block)
    with on_device_of(grad):
        _row_gradient_kernel[(height * out_width * blocks[0] * blocks[1],)](
            g, weight.contiguous(), rows, images, outputs, runs, channels * kh * kw, out_height, out_width,
            *g.stride(), stride[0], padding[0], dilation[0], *blocks, KH=kh, KW=kw,
            PRECISION=_precision(images, grad.dtype), num_stages=_STAGES, **tile,
        )  # fmt: skip
        _fold_rows_kernel[(height * width * fold_blocks,)](
            rows, gradient, images, channels, width, out_width, *gradient.stride(), stride[1], padding[1],
            dilation[1], fold_blocks, KW=kw, BLOCK=block,
        )  # fmt: skip
    return _finished(gradient, grad)


# ---- compiled ahead --------------------------------------------------------------------------------


def _variant(kernel: triton.JITFunction, dtype: str, images: int, note: str) -> Variant:
    """Of DeepFace's layer L5: 16 to 16 channels, 9 x 9."""
    names = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    itemsize, matrix, depth, runs = names[dtype].itemsize, images >= _MATRIX_IMAGES, 16 * 81, 16 * 9
    axes = {
        _conv2d_local_kernel: dict(ROWS=images, DEPTH=depth, COLUMNS=16),
        _weight_gradient_kernel: dict(DEPTH=images if matrix else 1, COLUMNS=depth, ROWS=16),
        _row_gradient_kernel: dict(ROWS=images, COLUMNS=runs, DEPTH=16),
    }[kernel]
    if matrix:
        tile = _matrix_tile(axes["ROWS"], axes["DEPTH"], axes["COLUMNS"], itemsize)
    else:
        tile = _tile_of_products(itemsize, **axes)
    one = "n" if matrix else "x"
    constants = {"KH": 9, "KW": 9, "PRECISION": _precision(images, names[dtype]), **tile}
    constants |= {f"{name}_{one}": 1 for name in ("stride", "grad", "out") if f"{name}_{one}" in kernel.arg_names}
    types = dict.fromkeys((n for n in kernel.arg_names if n not in constants), "i32")
    types |= {n: f"*{dtype}" for n in ("input", "grad", "weight", "output", "gradient") if n in types}
    if "rows" in types:
        types["rows"] = "*fp64" if dtype == "fp64" else "*fp32"
    # Wide instructions take tiles of 64 rows: others are products of the older kind.
    wide = matrix and tile["ROWS"] == 64 and itemsize < 8
    divisible = ("images", "outputs", "depth", "runs") if matrix else ("outputs", "depth", "runs")
    divisible = tuple(n for n in divisible if n in types)
    return Variant(kernel, types, constants, divisible, num_stages=_STAGES, matrix=wide, note=note)


VARIANTS = [
    _variant(_conv2d_local_kernel, "fp32", 1, "1 image, 16 x 63 x 63 to 16 x 55 x 55, 9 x 9; 251 MB: 58 us"),
    _variant(_conv2d_local_kernel, "fp32", 64, "64 images of it; 8 GFLOP: 62 us"),
    _variant(_conv2d_local_kernel, "bf16", 64, "the same; 144 MB: 33 us"),
    _variant(_conv2d_local_kernel, "fp64", 64, "the same; 564 MB: 131 us"),
    _variant(_weight_gradient_kernel, "fp32", 8, "8 images; 255 MB: 59 us"),
    _variant(_weight_gradient_kernel, "fp32", 64, "64 images; 8 GFLOP: 62 us"),
    _variant(_weight_gradient_kernel, "bf16", 64, "the same; 144 MB: 33 us"),
    _variant(_row_gradient_kernel, "fp32", 8, "8 images; 251 MB, and sums of 16 MB: 62 us"),
    _variant(_row_gradient_kernel, "fp32", 64, "64 images; 8 GFLOP: 62 us, and sums of 128 MB: 30 us"),
    _variant(_row_gradient_kernel, "bf16", 64, "the same; 126 MB, and sums of 128 MB: 59 us"),
    Variant(
        _fold_rows_kernel,
        dict.fromkeys(_fold_rows_kernel.arg_names[2:-2], "i32") | {"rows": "*fp32", "gradient": "*fp32"},
        {"stride_n": 1, "KW": 9, "BLOCK": 1024}, ("images",), note="64 images; 144 MB: 34 us",
    ),
]  # fmt: skip
