"""Deformable convolution in plain PyTorch: the specification of ``csrc/deform_conv2d``.

All is made of differentiable operators, and the derivatives of the backward pass stand here as formulas, so that
derivatives of any order follow. ``mask`` is read only with ``use_mask``; an empty ``bias`` means none.

Shapes: G offset groups, T kernel elements, P output pixels; samples are ``[N, G, C / G, T, P]``, positions the same
with 1 channel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def output_size(size: int, kernel: int, stride: int, pad: int, dilation: int) -> int:
    return (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1


def _accumulate(*tensors: Tensor) -> list[Tensor]:
    double = any(t.dtype == torch.float64 for t in tensors)
    return [t.to(torch.float64 if double else torch.float32) for t in tensors]


def _einsum(equation: str, left: Tensor, right: Tensor) -> Tensor:
    """In the types of the tensors, under autocast too."""
    with torch.autocast(left.device.type, enabled=False):
        return torch.einsum(equation, left, right)


class _Axis:
    """Positions along one axis: index of the lower pixel, distance from it."""

    def __init__(self, base: Tensor, offset: Tensor, size: int):
        at = (base.to(offset.dtype) + offset).flatten(4)
        self.nan = at.isnan()
        low = torch.where(self.nan, 0, at.detach()).floor().clamp(-2, size)
        self.low, self.size = low.long(), size
        # Far out nothing is read, and infinity minus a bound would be no fraction.
        self.fraction = torch.where((at < -2) | (at > size), 0, at - low)
        self.inside = (at > -1) & (at < size)

    def valid(self, step: int) -> Tensor:
        return (self.low + step >= 0) & (self.low + step < self.size)


class _Positions:
    """Where the kernel elements sample."""

    def __init__(self, input: Tensor, weight: Tensor, offset: Tensor, geometry):
        stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, self.groups, offset_groups = geometry
        batch, channels, height, width = input.shape
        self.out_size, kernel_w = tuple(offset.shape[2:]), weight.shape[3]
        self.in_size, self.in_shape = (height, width), input.shape
        self.planes_shape = (batch, offset_groups, channels // offset_groups, height * width)
        tap = torch.arange(weight.shape[2] * kernel_w, device=offset.device)[:, None, None]
        row, column = (torch.arange(n, device=offset.device) for n in self.out_size)
        base_y = tap // kernel_w * dilation_h + row[:, None] * stride_h - pad_h
        base_x = tap % kernel_w * dilation_w + column * stride_w - pad_w
        offset_y, offset_x = self.components(offset)
        self.y, self.x = _Axis(base_y, offset_y, height), _Axis(base_x, offset_x, width)
        self.nan = self.y.nan | self.x.nan
        self.inside = self.y.inside & self.x.inside
        steps = [(dy, dx) for dy in (0, 1) for dx in (0, 1)]
        self.valid = [self.y.valid(dy) & self.x.valid(dx) & ~self.nan for dy, dx in steps]
        index = [(self.y.low + dy) * width + self.x.low + dx for dy, dx in steps]
        self.index = [torch.where(v, i, 0) for v, i in zip(self.valid, index, strict=True)]
        fy, fx = (torch.where(self.nan, torch.nan, axis.fraction) for axis in (self.y, self.x))
        self.weights = [(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx]
        # Derivatives of the weights with respect to y and to x; on a pixel, those to the right.
        self.weights_y = [fx - 1, -fx, 1 - fx, fx]
        self.weights_x = [fy - 1, 1 - fy, -fy, fy]

    def components(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        """The offset, or anything of its shape, as y and x ``[N, G, 1, T, OH, OW]``."""
        batch, groups = self.planes_shape[:2]
        taps = offset.shape[1] // (2 * groups)
        return offset.reshape(batch, groups, 1, taps, 2, *self.out_size).unbind(4)

    def flat_components(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        y, x = self.components(offset)
        return y.flatten(4), x.flatten(4)

    def modulation(self, mask: Tensor, use_mask: bool) -> Tensor:
        return mask.reshape(self.y.low.shape) if use_mask else torch.ones_like(self.weights[0])

    def read(self, input: Tensor) -> list[Tensor]:
        """The four pixels of each sample; those outside the input are zero."""
        planes, corners = input.reshape(self.planes_shape), []
        for index, valid in zip(self.index, self.valid, strict=True):
            shape = (*planes.shape[:3], *index.shape[3:])
            corner = planes.gather(3, index.expand(shape).flatten(3)).view(shape)
            # Exactly at -1 a pixel has weight 0, but a derivative to its side: infinity must not be weighed.
            corners.append(torch.where(valid & (self.inside | corner.isfinite()), corner, 0))
        return corners

    def scatter(self, value: Tensor, slope_y: Tensor | None = None, slope_x: Tensor | None = None):
        """The transpose of ``input -> samples(read(input))``, as far as its results are given."""
        total = value.new_zeros(self.planes_shape)
        for k in range(4):
            part = self.weights[k] * value
            if slope_y is not None:
                part = part + self.weights_y[k] * slope_y + self.weights_x[k] * slope_x
            part = torch.where(self.valid[k], part, 0).flatten(3)
            total = total.scatter_add(3, self.index[k].expand(value.shape).flatten(3), part)
        return total.reshape(self.in_shape)

    def samples(self, corners: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Values, and their derivatives with respect to y and x."""
        all_weights = (self.weights, self.weights_y, self.weights_x)
        return tuple(sum(w * c for w, c in zip(ws, corners, strict=True)) for ws in all_weights)

    # ---- products with the weight, group by group --------------------------------------------------

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1:].numel())

    def _by_group(self, channels: Tensor) -> Tensor:
        return channels.unflatten(1, (self.groups, channels.shape[1] // self.groups))

    def multiply(self, weight: Tensor, columns: Tensor) -> Tensor:
        """Outputs ``[N, O, OH, OW]``."""
        columns = self._by_group(columns.flatten(1, 2)).flatten(2, 3)
        outputs = _einsum("gok,ngkp->ngop", self._matrix(weight), columns)
        return outputs.flatten(1, 2).unflatten(2, self.out_size)

    def multiply_transposed(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Columns, from a gradient of the outputs."""
        columns = _einsum("gok,ngop->ngkp", self._matrix(weight), self._by_group(grad.flatten(2)))
        return columns.reshape(*self.planes_shape[:3], *self.y.low.shape[3:])

    def multiply_outer(self, grad: Tensor, columns: Tensor) -> Tensor:
        """The gradient of the weight, ``[groups, O / groups, C / groups * T]``."""
        columns = self._by_group(columns.flatten(1, 2)).flatten(2, 3)
        return _einsum("ngop,ngkp->gok", self._by_group(grad.flatten(2)), columns)


def deform_conv2d(
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
) -> Tensor:
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, offset_groups)
    memory_format, dtype = torch._prims_common.suggest_memory_format(input), input.dtype
    input, weight, offset, mask, bias = _accumulate(input, weight, offset, mask, bias)
    at = _Positions(input, weight, offset, geometry)
    value, _, _ = at.samples(at.read(input))
    output = at.multiply(weight, value * at.modulation(mask, use_mask))
    if bias.numel():
        output = output + bias[:, None, None]
    return output.to(dtype).contiguous(memory_format=memory_format)


def offset_tangent(tangent, input, weight, offset, mask, *geometry_and_use_mask) -> Tensor:
    """The tangent of the output for a tangent of the offset."""
    *geometry, use_mask = geometry_and_use_mask
    dtype = input.dtype
    tangent, input, weight, offset, mask = _accumulate(tangent, input, weight, offset, mask)
    at = _Positions(input, weight, offset, geometry)
    _, slope_y, slope_x = at.samples(at.read(input))
    y, x = at.flat_components(tangent)
    columns = (slope_y * y + slope_x * x) * at.modulation(mask, use_mask)
    return at.multiply(weight, columns).to(dtype)


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
    """Gradients of input, weight, offset, mask and bias; those whose bit in ``needs`` is not set are empty."""
    originals = (input, weight, offset, mask, bias)
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, offset_groups)
    grad, input, weight, offset, mask, bias = _accumulate(grad, *originals)
    at = _Positions(input, weight, offset, geometry)
    value, slope_y, slope_x = at.samples(at.read(input))
    modulation = at.modulation(mask, use_mask)
    grad_columns = at.multiply_transposed(weight, grad)
    grad_samples = grad_columns * modulation
    gradients = (
        at.scatter(grad_samples),
        at.multiply_outer(grad, value * modulation),
        _offset_like((grad_samples * slope_y).sum(2), (grad_samples * slope_x).sum(2)),
        (grad_columns * value).sum(2),
        grad.sum((0, 2, 3)),
    )
    return _finish(gradients, originals, use_mask, needs)


def _offset_like(y: Tensor, x: Tensor) -> Tensor:
    return torch.stack((y, x), dim=3)


def _finish(gradients, originals, use_mask: bool, needs: int) -> tuple[Tensor, ...]:
    """Shapes, types and layouts of the originals; empty where not wanted."""
    results = []
    for i, (gradient, original) in enumerate(zip(gradients, originals, strict=True)):
        if not needs >> i & 1 or (i == 3 and not use_mask):
            results.append(original.new_empty(0))
            continue
        if i == 4 and not original.numel():
            gradient = gradient[:0]
        memory_format = torch.contiguous_format
        if i == 0:
            memory_format = torch._prims_common.suggest_memory_format(original)
        gradient = gradient.reshape(original.shape).to(original.dtype)
        results.append(gradient.contiguous(memory_format=memory_format))
    return tuple(results)


# ---- derivatives of the backward pass ----------------------------------------------------------------
#
# With samples S of the input, their slopes Sy and Sx and the mixed derivative Sxy (the pure second ones are zero),
# mask M, weight W and gradient g of the output, the backward pass computes
#     C = W^T g,   D = M C,   gradients: scatter(D), g (M S)^T, (sum D Sy, sum D Sx), sum C S, sum g
# where sums go over the channels of an offset group (the last over images and pixels).


def _cross(corners: list[Tensor]) -> Tensor:
    a, b, c, d = corners
    return a - b - c + d


def backward_tangents(tangents, primals, *constants) -> tuple[Tensor, ...]:
    """Tangents of the results of :func:`deform_conv2d_backward` for tangents of its six tensors."""
    *geometry, use_mask, needs = constants
    originals = primals[1:]
    grad, input, weight, offset, mask, _ = _accumulate(*primals)
    grad_t, input_t, weight_t, offset_t, mask_t, _ = _accumulate(*tangents)
    at = _Positions(input, weight, offset, geometry)
    corners = at.read(input)
    s, sy, sx = at.samples(corners)
    t, ty, tx = at.samples(at.read(input_t))
    y, x = at.flat_components(offset_t)
    t, ty, tx = t + sy * y + sx * x, ty + _cross(corners) * x, tx + _cross(corners) * y
    m = at.modulation(mask, use_mask)
    m_t = at.modulation(mask_t, True) if use_mask else torch.zeros_like(m)
    c = at.multiply_transposed(weight, grad)
    c_t = at.multiply_transposed(weight_t, grad) + at.multiply_transposed(weight, grad_t)
    d, d_t = m * c, m_t * c + m * c_t
    gradients = (
        at.scatter(d_t, None) + at.scatter(torch.zeros_like(d), d * y, d * x),
        at.multiply_outer(grad_t, m * s) + at.multiply_outer(grad, m_t * s + m * t),
        _offset_like((d_t * sy + d * ty).sum(2), (d_t * sx + d * tx).sum(2)),
        (c_t * s + c * t).sum(2),
        grad_t.sum((0, 2, 3)),
    )
    return _finish(gradients, originals, use_mask, needs)


def backward_gradients(grads, primals, *constants) -> tuple[Tensor, ...]:
    """Gradients of the six tensors of :func:`deform_conv2d_backward` for gradients of its results."""
    *geometry, use_mask, needs = constants
    # A result that was not wanted is constant.
    grads = [
        grad if needs >> i & 1 and (i != 3 or use_mask) else torch.zeros_like(primal)
        for i, (grad, primal) in enumerate(zip(grads, primals[1:], strict=True))
    ]
    grad, input, weight, offset, mask, bias = _accumulate(*primals)
    of_input, of_weight, of_offset, of_mask, of_bias = _accumulate(*grads)
    at = _Positions(input, weight, offset, geometry)
    corners = at.read(input)
    s, sy, sx = at.samples(corners)
    t, ty, tx = at.samples(at.read(of_input))
    y, x = at.flat_components(of_offset)
    m = at.modulation(mask, use_mask)
    of_m = at.modulation(of_mask, True) if use_mask else torch.zeros_like(m)
    c = at.multiply_transposed(weight, grad)
    d = m * c
    of_d = t + y * sy + x * sx
    of_c = m * of_d + of_m * s
    of_columns = at.multiply_transposed(of_weight, grad)
    of_s = m * of_columns + of_m * c
    grad_of_grad = at.multiply(weight, of_c) + at.multiply(of_weight, m * s)
    if bias.numel():
        grad_of_grad = grad_of_grad + of_bias[:, None, None]
    cross = _cross(corners)
    gradients = (
        at.scatter(of_s, d * y, d * x),
        at.multiply_outer(grad, of_c),
        _offset_like((of_s * sy + d * x * cross + d * ty).sum(2), (of_s * sx + d * y * cross + d * tx).sum(2)),
        (c * of_d + of_columns * s).sum(2),
        torch.zeros_like(grad).sum((0, 2, 3)),
    )
    finished = _finish(gradients, primals[1:], True, 31 if use_mask else 31 - 8)
    return grad_of_grad.to(primals[0].dtype), *finished
