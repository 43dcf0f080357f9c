"""Deformable convolution, with and without modulation, and its layer.

Defined on every path alike:

* a sample is bilinear; pixels outside the input count as zero, so a sample a pixel or more outside is zero;
* where a sample lies exactly on a pixel, its derivative with respect to the position is the one to the right;
* a NaN among offset and mask makes the outputs that use it NaN, gives no gradient to the input, and no more than that;
* sums are in float32 (float64 for float64 tensors). Types may differ, but float64 does not mix with others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import reference
from .._library import LIBRARY, define
from ._autograd import register_autograd
from ._checks import check_floating, check_same_device, check_shape, pair
from ._rois import fold_images, front

_GEOMETRY = (
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, "
    "SymInt groups, SymInt offset_groups, bool use_mask"
)
# torchvision's order of arguments. An empty bias means none; the mask is read only with use_mask.
define(
    f"deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, {_GEOMETRY}) -> Tensor",
    reference.deform_conv2d.deform_conv2d,
    triton=True,
    triton_before_compiled=True,  # it has the matrix units
)
# Bit i of `needs` asks for gradient i; the others are empty.
define(
    "deform_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
    f"{_GEOMETRY}, int needs=31) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.deform_conv2d.deform_conv2d_backward,
    triton=True,
    triton_before_compiled=True,
)
_INPUT, _WEIGHT, _OFFSET, _MASK, _BIAS = (1 << i for i in range(5))


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Convolution whose kernel elements sample the input at learned offsets.

    Without ``mask``, deformable convolution (Dai et al., "Deformable Convolutional Networks", ICCV 2017, section 2.1);
    with it, modulated deformable convolution (Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results",
    CVPR 2019, section 3.2). The number of groups and of offset groups follows from the shapes.

    Args:
        input: ``[N, C, H, W]``, any floating type, contiguous or channels-last; both are read in place.
        offset: ``[N, 2 * G * kh * kw, OH, OW]`` for G offset groups, in pixels: for each group and kernel element the
            offset in y, then in x. Channels are divided among the offset groups in order.
        weight: ``[O, C / groups, kh, kw]``.
        bias: ``[O]`` or None.
        stride: distance between the windows of neighbouring outputs, an int or (height, width).
        padding: pixels of zeros around the input, an int or (height, width).
        dilation: distance between kernel elements, an int or (height, width).
        mask: ``[N, G * kh * kw, OH, OW]``, a factor for each sample, usually in 0 to 1; or None.

    Returns:
        ``[N, O, OH, OW]`` with ``OH = (H + 2 * padding - dilation * (kh - 1) - 1) // stride + 1``, in the input's dtype
        and memory format. Differentiable in both modes, twice; results and gradients are bit-equal for any number of
        threads. Second derivatives, and tangents of ``offset``, go through plain PyTorch, at its cost.

        Under autocast nothing is converted: tensors are read in whatever types they come, sums are in float32, and the
        output has the type of ``input``.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or device.

    Example:
        >>> import torch, fastcv
        >>> x = torch.arange(9.).reshape(1, 1, 3, 3)
        >>> half_a_pixel_right = torch.tensor([0., 0.5]).reshape(1, 2, 1, 1).expand(1, 2, 3, 3)
        >>> fastcv.ops.deform_conv2d(x, half_a_pixel_right, torch.ones(1, 1, 1, 1))
        tensor([[[[0.5000, 1.5000, 1.0000],
                  [3.5000, 4.5000, 2.5000],
                  [6.5000, 7.5000, 4.0000]]]])
    """
    stride, dilation = pair("stride", stride), pair("dilation", dilation)
    padding = pair("padding", padding, minimum=0)
    groups, offset_groups = _check(input, offset, weight, bias, stride, padding, dilation, mask)
    return torch.ops.fastcv.deform_conv2d(
        input,
        weight,
        offset,
        input.new_empty(0) if mask is None else mask,
        input.new_empty(0) if bias is None else bias,
        *stride,
        *padding,
        *dilation,
        groups,
        offset_groups,
        mask is not None,
    )


def _check(input, offset, weight, bias, stride, padding, dilation, mask) -> tuple[int, int]:
    """Raises for arguments that do not fit together; returns the groups and offset groups that their shapes imply."""
    tensors = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in tensors.items():
        check_floating(name, tensor)
        check_same_device(name, tensor, "input", input)
        if (tensor.dtype == torch.float64) != (input.dtype == torch.float64):
            raise TypeError(f"{name}: expected a type that mixes with input's {input.dtype}, got {tensor.dtype}")
    check_shape("input", input, ("N", "C", "H", "W"))
    check_shape("weight", weight, ("O", "C / groups", "kh", "kw"))
    channels, (outputs, in_group, *kernel) = input.shape[1], weight.shape
    if in_group == 0 or channels == 0 or channels % in_group != 0:
        raise ValueError(
            f"weight: expected a size of dimension 1 that divides input's {channels} channels, got {in_group}"
        )
    groups = channels // in_group
    if outputs % groups != 0:
        raise ValueError(f"weight: expected a multiple of {groups} groups in dimension 0, got {outputs}")
    size = [
        reference.deform_conv2d.output_size(*axis)
        for axis in zip(input.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    if min(kernel) < 1 or min(input.shape[2:]) < 1 or min(size) < 1:
        raise ValueError(
            f"input: expected height and width that hold a kernel of {tuple(kernel)} with dilation {dilation} and "
            f"padding {padding}, got {tuple(input.shape[2:])}"
        )
    taps = kernel[0] * kernel[1]
    check_shape("offset", offset, (input.shape[0], f"G * {2 * taps}", *size))
    offset_groups = offset.shape[1] // (2 * taps)
    if offset_groups == 0 or offset.shape[1] % (2 * taps) or channels % offset_groups:
        raise ValueError(
            f"offset: expected 2 * {taps} channels (y and x of each kernel element) for each of G offset groups, G a "
            f"divisor of input's {channels} channels, got {offset.shape[1]}"
        )
    if mask is not None:
        check_shape("mask", mask, (input.shape[0], offset_groups * taps, *size))
    if bias is not None:
        check_shape("bias", bias, (outputs,))
    return groups, offset_groups


class DeformConv2d(nn.Module):
    """:func:`deform_conv2d` as a layer that holds weight and bias; offset and mask are arguments of each call.

    Args:
        in_channels: C, divisible by ``groups``.
        out_channels: O, divisible by ``groups``.
        kernel_size: an int or (height, width).
        stride, padding, dilation: as in :func:`deform_conv2d`.
        groups: groups of channels that are convolved apart from each other.
        bias: whether there is a bias.

    Raises:
        ValueError: channels that ``groups`` does not divide, or sizes below their minimum.

    Example:
        >>> import torch, fastcv
        >>> layer = fastcv.ops.DeformConv2d(4, 8, 3, padding=1)
        >>> layer(torch.zeros(1, 4, 5, 5), torch.zeros(1, 18, 5, 5), torch.ones(1, 9, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups != 0:
                raise ValueError(f"{name}: expected a multiple of groups = {groups}, got {channels}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair("kernel_size", kernel_size)
        self.stride = pair("stride", stride)
        self.padding = pair("padding", padding, minimum=0)
        self.dilation = pair("dilation", dilation)
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight and bias uniform within 1 / sqrt(fan-in), as in ``torch.nn.Conv2d``."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}"]
        parts.append(f"stride={self.stride}")
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1)):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)}")
        if self.bias is None:
            parts.append("bias=False")
        return ", ".join(parts)


# ---- fake kernels --------------------------------------------------------------------------------


def _empty(like: Tensor, shape) -> Tensor:
    memory_format = torch._prims_common.suggest_memory_format(like)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


@torch.library.register_fake("fastcv::deform_conv2d", lib=LIBRARY)
def _(input, weight, offset, mask, bias, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, *_):
    size = reference.deform_conv2d.output_size
    height = size(input.shape[2], weight.shape[2], stride_h, pad_h, dilation_h)
    width = size(input.shape[3], weight.shape[3], stride_w, pad_w, dilation_w)
    return _empty(input, (input.shape[0], weight.shape[0], height, width))


@torch.library.register_fake("fastcv::deform_conv2d_backward", lib=LIBRARY)
def _(grad, input, weight, offset, mask, bias, *constants):
    use_mask, needs = _use_mask_and_needs(constants)
    others = [
        t.new_empty(t.shape if needs >> i & 1 and (i != 3 or use_mask) else (0,))
        for i, t in enumerate((weight, offset, mask, bias), start=1)
    ]
    return (_empty(input, input.shape) if needs & _INPUT else input.new_empty(0), *others)


def _use_mask_and_needs(constants: tuple) -> tuple[bool, int]:
    """The dispatcher leaves out arguments that equal their default."""
    return constants[8], constants[9] if len(constants) > 9 else 31


# ---- derivatives: first ones by kernels, the others through the reference ---------------------------


def _save(ctx, inputs, tensors: int) -> None:
    ctx.save_for_backward(*inputs[:tensors])
    ctx.save_for_forward(*inputs[:tensors])
    ctx.constants = inputs[tensors:]


def _setup_forward(ctx, inputs, output):
    _save(ctx, inputs, 5)


def _backward_of_forward(ctx, grad):
    tensors = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:5])
    wanted[3] &= ctx.constants[8]
    needs = sum(1 << i for i, want in enumerate(wanted) if want)
    gradients = torch.ops.fastcv.deform_conv2d_backward(grad, *tensors, *ctx.constants, needs)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *[None] * 9


def _jvp_of_forward(ctx, input_t, weight_t, offset_t, mask_t, bias_t, *_):
    """The operator is linear in each of input, weight and mask."""
    input, weight, offset, mask, _ = ctx.saved_tensors
    no_bias = input.new_empty(0)
    terms = []
    if input_t is not None:
        terms.append((input_t, weight, offset, mask, no_bias))
    if weight_t is not None:
        terms.append((input, weight_t, offset, mask, no_bias))
    if mask_t is not None and ctx.constants[8]:
        terms.append((input, weight, offset, mask_t, no_bias))
    terms = [torch.ops.fastcv.deform_conv2d(*term, *ctx.constants) for term in terms]
    if offset_t is not None:
        tensors = (offset_t, input, weight, offset, mask)
        terms.append(reference.deform_conv2d.offset_tangent(*tensors, *ctx.constants))
    if bias_t is not None and bias_t.shape[0] > 0:
        shape = (input.shape[0], weight.shape[0], *offset.shape[2:])
        terms.append(bias_t.to(input.dtype)[:, None, None].expand(shape))
    return sum(terms[1:], terms[0]) if terms else None


def _setup_backward(ctx, inputs, output):
    _save(ctx, inputs, 6)


def _backward_of_backward(ctx, *grads):
    gradients = reference.deform_conv2d.backward_gradients(grads, ctx.saved_tensors, *ctx.constants)
    wanted = list(ctx.needs_input_grad[:6])
    wanted[4] &= ctx.constants[8]
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *[None] * 10


def _jvp_of_backward(ctx, *tangents):
    primals = ctx.saved_tensors
    tangents = [
        torch.zeros_like(primal) if tangent is None else tangent
        for tangent, primal in zip(tangents, primals, strict=False)
    ]
    return reference.deform_conv2d.backward_tangents(tangents, primals, *ctx.constants)


register_autograd("deform_conv2d", setup_context=_setup_forward, backward=_backward_of_forward, jvp=_jvp_of_forward)
register_autograd(
    "deform_conv2d_backward",
    setup_context=_setup_backward,
    backward=_backward_of_backward,
    jvp=_jvp_of_backward,
)


# ---- vmap: the mapped dimension joins the images, or the groups where weights are mapped ---------------


def _fold_channels(value: Tensor, dim: int | None, size: int) -> Tensor:
    """``[..., N, C, H, W]`` as ``[N, size * C, H, W]``."""
    return front(value, dim, size).transpose(0, 1).flatten(1, 2)


def _fold(tensors, in_dims, size: int, by_group: bool, constants):
    """([grad,] input, weight, offset, mask, bias) and the constants, without the mapped dimension."""
    *maps, weight, offset, mask, bias = tensors
    *map_dims, weight_dim, offset_dim, mask_dim, bias_dim = in_dims[: len(tensors)]
    fold = _fold_channels if by_group else fold_images
    *geometry, groups, offset_groups, use_mask = constants[:9]
    if by_group:
        weight = front(weight, weight_dim, size).flatten(0, 1)
        bias = front(bias, bias_dim, size).flatten(0, 1)
        groups, offset_groups = groups * size, offset_groups * size
    maps = [fold(value, dim, size) for value, dim in zip(maps, map_dims, strict=True)]
    mask = fold(mask, mask_dim, size) if use_mask else mask.new_empty(0)
    offset = fold(offset, offset_dim, size)
    return *maps, weight, offset, mask, bias, *geometry, groups, offset_groups, use_mask


def _split(folded: Tensor, dim: int, size: int) -> Tensor:
    return folded.unflatten(dim, (size, folded.shape[dim] // size))


def _forward_vmap(info, in_dims, *args):
    size = info.batch_size
    by_group = in_dims[1] is not None or in_dims[4] is not None
    output = torch.ops.fastcv.deform_conv2d(*_fold(args[:5], in_dims, size, by_group, args[5:]))
    dim = 1 if by_group else 0
    return _split(output, dim, size), dim


def _backward_vmap(info, in_dims, *args):
    size = info.batch_size
    use_mask, needs = _use_mask_and_needs(args[6:])
    by_group = bool(needs & (_WEIGHT | _BIAS)) or in_dims[2] is not None or in_dims[5] is not None
    folded = _fold(args[:6], in_dims, size, by_group, args[6:])
    gradients = torch.ops.fastcv.deform_conv2d_backward(*folded, needs)
    dim = 1 if by_group else 0
    dims = [dim, 0, dim, dim, 0]
    for i in range(5):
        if not needs >> i & 1 or (i == 3 and not use_mask):
            dims[i] = None
    return tuple(g if d is None else _split(g, d, size) for g, d in zip(gradients, dims, strict=True)), tuple(dims)


torch.library.register_vmap("fastcv::deform_conv2d", _forward_vmap, lib=LIBRARY)
torch.library.register_vmap("fastcv::deform_conv2d_backward", _backward_vmap, lib=LIBRARY)
