"""The reverse of max pooling: :func:`max_unpool2d`.

Defined on every path alike:

* a pixel at which several windows point gets the value of the last of them in reading order, and only that window gets
  its gradient;
* an index outside the map raises, and names the first one in reading order; on CUDA devices, where that would wait for
  the device, the first pixel of its plane is NaN, and so is its gradient;
* all else is zero.

In ONNX graphs it becomes ``ScatterElements``, after a ``ScatterElements`` with ``max`` that finds the last windows
where they may overlap; compact indices are then torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ._checks import check_same_device, check_tensor, pair
from ._pooling import Size, call, check_map, in_onnx_export, window
from .max_pool2d import PooledIndices, _max_unpool2d


def max_unpool2d(
    input: Tensor,
    indices: Tensor | PooledIndices,
    kernel_size: Size | None = None,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: tuple[int, ...] | list[int] | torch.Size | None = None,
) -> Tensor:
    """Puts values where the maxima of :func:`max_pool2d` were: :func:`torch.nn.functional.max_unpool2d`.

    Args:
        input: ``[N, C, OH, OW]`` or ``[C, OH, OW]``, any floating type, contiguous or channels-last.
        indices: of the input's shape: int64 as torch has them, or what :func:`max_pool2d` returns as compact ones.
        kernel_size, stride, padding: those of the pooling; compact indices know them.
        output_size: the size before pooling, where the windows leave it open; its last two numbers count. Compact
            indices know it.

    Returns:
        ``[N, C, H, W]`` in the input's dtype and memory format. Differentiable with respect to ``input`` in both modes,
        twice; bit-equal for any number of threads.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or value, or that contradicts compact indices.
        RuntimeError: an index outside the map (on the CPU).

    Source: Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, section 2.1.

    Example:
        >>> import torch, fastcv
        >>> values, indices = fastcv.ops.max_pool2d(torch.tensor([[[1., 4], [3, 2]]]), 2, return_indices=True)
        >>> fastcv.ops.max_unpool2d(values, indices, 2)
        tensor([[[0., 4.],
                 [0., 0.]]])
    """
    check_map(input)
    if isinstance(indices, PooledIndices):
        positions, size = indices.positions, indices.input_size
        w = _agreed(indices, kernel_size, stride, padding, output_size)
    else:
        positions = indices
        check_tensor("indices", positions)
        if positions.dtype != torch.int64:
            raise TypeError(f"indices: expected int64 or PooledIndices, got {positions.dtype}")
        if kernel_size is None:
            raise TypeError("kernel_size: expected an int or a pair of ints with int64 indices, got None")
        w = window(kernel_size, stride, padding)
        size = _output_size(input, w, output_size)
    if positions.shape != input.shape:
        raise ValueError(f"indices: expected the shape of input, {list(input.shape)}, got {list(positions.shape)}")
    check_same_device("indices", positions, "input", input)
    if torch.compiler.is_compiling() and in_onnx_export():
        return _of_scatter(input, positions, size, w)
    if input.dim() == 4:
        return call(_max_unpool2d, input, positions, *size, *w, False)
    return call(_max_unpool2d, input[None], positions[None], *size, *w, False)[0]


def _agreed(indices: PooledIndices, kernel_size, stride, padding, output_size) -> list[int]:
    """The windows that compact indices know, if nothing else is asked for."""
    if kernel_size is not None:
        given = window(kernel_size, stride, padding)[:6]
        if given != indices.window[:6]:
            raise ValueError(
                f"kernel_size, stride, padding: expected those of indices, {indices.window[:6]}, or none, got {given}"
            )
    if output_size is not None and tuple(output_size[-2:]) != tuple(indices.input_size):
        raise ValueError(f"output_size: expected that of indices, {indices.input_size}, or none, got {output_size}")
    return indices.window


def _output_size(input: Tensor, w: list[int], output_size) -> tuple[int, int]:
    size = tuple((input.shape[d - 2] - 1) * w[2 + d] - 2 * w[4 + d] + w[d] for d in (0, 1))
    if output_size is None:
        return size
    if len(output_size) not in (2, input.dim()):
        raise ValueError(f"output_size: expected 2 or {input.dim()} numbers, got {list(output_size)}")
    given = pair("output_size", tuple(output_size[-2:]))
    if any(abs(g - s) >= w[2 + d] for d, (g, s) in enumerate(zip(given, size, strict=True))):
        raise ValueError(f"output_size: expected less than a stride from {size}, got {list(output_size)}")
    return given


def _of_scatter(input: Tensor, positions: Tensor, size: tuple[int, int], w: list[int]) -> Tensor:
    """Of operators that ONNX has."""
    lead, pixels = input.shape[:-2], size[0] * size[1]
    values, index = (t.reshape(-1, 1, input.shape[-2] * input.shape[-1]) for t in (input, positions))
    if all(w[2 + d] >= w[d] for d in (0, 1)):
        out = values.new_zeros(values.shape[0], 1, pixels).scatter(2, index, values)
    else:
        out = reference.max_pool2d.unpool_flat(values, index, pixels)
    return out.reshape(*lead, *size)
