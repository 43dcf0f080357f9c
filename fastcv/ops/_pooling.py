"""What the pooling operators share: windows, output sizes, how they are called, vmap."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ._autograd import needs_derivatives
from ._checks import check_floating, pair

_is_compiling = torch.compiler.is_compiling  # found once
_transforms = torch._C._functorch.peek_interpreter_stack
Size = int | tuple[int, int] | list[int]


def window(
    kernel_size: Size, stride: Size | None, padding: Size, dilation: Size = 1, *, reach: bool = True
) -> list[int]:
    """The eight numbers of the schemas, checked: kernel, stride, padding and dilation, each for rows and columns.

    Padding may be half of what the window spans, or with ``reach=False`` half of the kernel.
    """
    # torch.compile looks through a cache, and warns of it.
    if torch.compiler.is_compiling() or not _are_plain(kernel_size, stride, padding, dilation):
        return _window.__wrapped__(kernel_size, stride, padding, dilation, reach)
    return _window(kernel_size, stride, padding, dilation, reach)


def _is_plain(size) -> bool:
    """An int or two in a tuple, whose hash says all: those of 2.0, True and (2.0, 2) are those of ints."""
    kind = type(size)
    return kind is int or (kind is tuple and len(size) == 2 and type(size[0]) is int and type(size[1]) is int)


def _are_plain(kernel_size, stride, padding, dilation) -> bool:
    if type(kernel_size) is int and type(padding) is int and type(dilation) is int:  # the usual case
        return stride is None or _is_plain(stride)
    return (
        _is_plain(kernel_size) and _is_plain(padding) and _is_plain(dilation) and (stride is None or _is_plain(stride))
    )


@functools.lru_cache(maxsize=1024)
def _window(kernel_size, stride, padding, dilation, reach) -> list[int]:
    kernel = pair("kernel_size", kernel_size)
    # An empty list is what torch's schemas have for "as the kernel".
    strides = kernel if stride is None or (isinstance(stride, (list, tuple)) and not stride) else pair("stride", stride)
    pads, dilations = pair("padding", padding, minimum=0), pair("dilation", dilation)
    spans = [(k - 1) * d + 1 if reach else k for k, d in zip(kernel, dilations, strict=True)]
    if any(p > span // 2 for p, span in zip(pads, spans, strict=True)):
        raise ValueError(f"padding: expected at most half of what the window spans, {spans}, got {padding!r}")
    return [*kernel, *strides, *pads, *dilations]


def check_map(input: Tensor) -> None:
    """Dtype, and ``[N, C, H, W]`` or ``[C, H, W]``."""
    check_floating("input", input)
    if input.dim() not in (3, 4):
        raise ValueError(f"input: expected shape [N, C, H, W] or [C, H, W], got {list(input.shape)}")


def check_fits(input: Tensor, w: list[int], ceil_mode: bool) -> None:
    height, width = input.shape[-2:]
    reach_h, reach_w = (w[0] - 1) * w[6] + 1 - 2 * w[4], (w[1] - 1) * w[7] + 1 - 2 * w[5]
    if ceil_mode:  # a window may stand out by less than a stride
        reach_h, reach_w = max(1, reach_h - w[2] + 1), max(1, reach_w - w[3] + 1)
    if height < reach_h or width < reach_w or height < 1 or width < 1:
        raise ValueError(
            f"input: expected at least {max(reach_h, 1)} x {max(reach_w, 1)} pixels for this kernel_size and padding, "
            f"got {height} x {width}"
        )


def pooled_size(size: int, d: int, w: list[int], ceil_mode: bool) -> int:
    """Windows along axis ``d``: torch's rule, by which none starts behind the map and its padding."""
    kernel, stride, padding, dilation = w[d::2]
    out = (size + 2 * padding - dilation * (kernel - 1) - 1 + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


def plain() -> bool:
    """Whether neither torch.compile nor a transform of torch.func looks on: then a call may go below autograd."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


# Small maps go to torch's kernels, which compute the same: an operator of a library is called in 5 us (of 2 arguments)
# to 7 us (11) more than torch's own, and with a gradient in 60 us more, as its autograd kernel is in Python. What
# torch's kernels lose meanwhile grows with the taps, pixels times kernel over stride, and grows faster in contiguous
# maps, which torch takes element by element. Below these numbers of taps torch's are faster, for contiguous and
# channels-last maps, and for the same with a gradient; measured for 2x2 with stride 2 and 3x3 with stride 1 in float32
# with one thread, on maps of 1 x 8..256 x 8..56 x 8..56.
_TORCH_BELOW = {
    "max": (6_000, 40_000, 40_000, 300_000),
    "avg": (6_000, 100_000, 32_000, 400_000),
    "adaptive": (8_000, 50_000, 40_000, 300_000),
}
_MOST_BELOW = 400_000
_FULL_WIDTH = (torch.float32, torch.float64)  # in narrower types torch adds up gradients without more digits


def torch_is_faster(which: str, input: Tensor, kernel_size: Size = 1, stride=None, padding=0, dilation=1) -> bool:
    """Whether this is an eager call of valid arguments that torch's kernel serves sooner.

    Without dilation, by which windows may step over a map. Each line here is a part of what is to be saved.
    """
    if _is_compiling() or type(input) is not Tensor or input.dtype not in _FULL_WIDTH:
        return False
    pixels = input.numel()
    if pixels >= _MOST_BELOW:
        return False
    if not _are_plain(kernel_size, stride, padding, dilation):
        return False
    try:
        below, height, width = _torch_below(which, kernel_size, stride, padding, dilation)
    except ValueError:  # which the caller is to find
        return False
    gradient = 2 if input.requires_grad and torch.is_grad_enabled() else 0
    return (
        pixels < below[gradient if input.is_contiguous() else gradient + 1]
        and input.dim() == 4
        and input.size(2) >= height
        and input.size(3) >= width
        and input.is_cpu
        and _transforms() is None
    )


@functools.lru_cache(maxsize=1024)
def _torch_below(which, kernel_size, stride, padding, dilation) -> tuple[list[float], int, int]:
    """Pixels below which torch is faster, and the least height and width that surely fit."""
    w = _window(kernel_size, stride, padding, dilation, which == "max")
    taps = w[0] * w[1] / (w[2] * w[3])
    return [below / taps if w[6] == w[7] == 1 else 0 for below in _TORCH_BELOW[which]], w[0], w[1]


def call(op, tensor: Tensor, *rest):
    """``op(tensor, *rest)``; where no derivative is wanted past autograd's kernel in Python, which takes as long as a
    small pooling."""
    if plain() and not needs_derivatives(tensor):
        with torch._C._AutoDispatchBelowAutograd():
            return op(tensor, *rest)
    return op(tensor, *rest)


def in_onnx_export() -> bool:
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


def like(input: Tensor, size: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor in the memory format of ``input``, for fake kernels."""
    memory_format = torch._prims_common.suggest_memory_format(input)
    return torch.empty(size, dtype=dtype or input.dtype, device=input.device, memory_format=memory_format)


def is_channels_last(map: Tensor) -> bool:
    return not map.is_contiguous() and map.is_contiguous(memory_format=torch.channels_last)


def in_format(grad: Tensor, channels_last: bool) -> Tensor:
    """A gradient in the memory format that its map had: maps of one pixel do not show it."""
    if not channels_last:
        return grad
    if tuple(grad.shape[2:]) == (1, 1):
        return grad.reshape(grad.shape[0], 1, 1, grad.shape[1]).permute(0, 3, 1, 2)
    return grad.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def fold_images(op):
    """A vmap rule: the mapped dimension joins the images of all tensors."""

    def rule(info, in_dims, *args):
        folded, images = [], 0  # of a sample
        for arg, dim in zip(args, in_dims, strict=True):
            if isinstance(arg, Tensor):
                arg = arg.movedim(dim, 0) if dim is not None else arg.expand(info.batch_size, *arg.shape)
                images = arg.shape[1]
                arg = arg.flatten(0, 1)
            folded.append(arg)
        results = op(*folded)
        many = isinstance(results, tuple)
        # An output that there is none of has no images.
        unfolded = tuple(
            r.unflatten(0, (info.batch_size, images)) if r.dim() == 4 else r.expand(info.batch_size, *r.shape)
            for r in (results if many else (results,))
        )
        return (unfolded, (0,) * len(unfolded)) if many else (unfolded[0], 0)

    return rule
