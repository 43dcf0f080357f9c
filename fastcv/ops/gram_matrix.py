"""Gram matrices of feature maps and the style loss made of them: :func:`gram_matrix`, :func:`style_loss`.

A Gram matrix is symmetric, and only one half is computed. The features are read where they lie, in either memory
format, and never copied. Sums are made in float32 (float64 for float64), and half types are normalised before they are
rounded: a sum over an image would overflow float16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .._library import LIBRARY, define
from ..reference.gram_matrix import cross
from ._autograd import register_autograd
from ._checks import check_floating, check_same_device, check_shape
from ._rois import front

define(
    "gram_matrix(Tensor features, str normalize) -> Tensor",
    reference.gram_matrix.gram_matrix,
    triton=True,
    torch_has_kernel=True,
)
define(
    "gram_matrix_backward(Tensor grad, Tensor features, str normalize) -> Tensor",
    reference.gram_matrix.gram_matrix_backward,
    triton=True,
    torch_has_kernel=True,
)
define(
    "style_loss(Tensor[] features, Tensor[] targets, float[] weights) -> Tensor[]",
    reference.gram_matrix.style_loss,
    triton=True,
    torch_has_kernel=True,
)

_NORMALIZATIONS = {True: "elements", False: "none", "positions": "positions"}


def gram_matrix(features: Tensor, *, normalize: bool | str = True) -> Tensor:
    """``G[n, i, j] = scale * sum over positions of features[n, i] * features[n, j]``.

    Source: Gatys, Ecker and Bethge, "Image style transfer using convolutional neural networks", CVPR 2016, equation 3.

    Args:
        features: ``[N, C, H, W]``, any floating type, contiguous or channels-last.
        normalize: True: ``scale = 1 / (C * H * W)``; ``"positions"``: ``1 / (H * W)``; False: 1, as in the paper, whose
            loss divides instead.

    Returns:
        ``[N, C, C]`` in the dtype of ``features``, exactly symmetric; zeros for a map without positions. Differentiable
        in both modes, twice. Bit-equal for any number of threads.

    Raises:
        TypeError, ValueError: an argument of wrong type or shape.

    Example:
        >>> import torch, fastcv
        >>> x = torch.tensor([[1., 2.], [3., 4.]]).reshape(1, 2, 1, 2)
        >>> fastcv.ops.gram_matrix(x, normalize=False)[0]
        tensor([[ 5., 11.],
                [11., 25.]])
    """
    check_floating("features", features)
    check_shape("features", features, ("N", "C", "H", "W"))
    if not isinstance(normalize, (bool, str)) or normalize not in _NORMALIZATIONS:
        raise ValueError(f'normalize: expected True, False or "positions", got {normalize!r}')
    return torch.ops.fastcv.gram_matrix(features, _NORMALIZATIONS[normalize])


def style_loss(features: Sequence[Tensor], targets: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """``sum over layers l of weights[l] / 4 * sum over i, j of (G_l[i, j] - A_l[i, j])^2``, the mean over images.

    ``G_l`` is the Gram matrix of ``features[l]`` divided by its number of elements, ``A_l = targets[l]`` that of the
    style image. As ``G_l`` is divided before it is squared, this is the paper's ``1 / (4 N_l^2 M_l^2)`` of equation 4
    (its factor of 4 included), and holds as well for style images of another size.

    Source: Gatys, Ecker and Bethge, "Image style transfer using convolutional neural networks", CVPR 2016, equations 4
    and 5.

    Args:
        features: of each layer ``[N, C_l, H_l, W_l]``, one floating type, contiguous or channels-last.
        targets: of each layer ``[C_l, C_l]``, ``[1, C_l, C_l]`` or ``[N, C_l, C_l]``: :func:`gram_matrix` of the style
            image's features.
        weights: of the layers; by default ``1 / len(features)``, as in the paper's experiments.

    Returns:
        A scalar, float64 for float64 features, else float32. Differentiable with respect to features and targets, in
        both modes, twice.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or device; lists of different or no length.

    Example:
        >>> import torch, fastcv
        >>> x = torch.ones(1, 2, 3, 3)
        >>> fastcv.ops.style_loss([x], [torch.zeros(2, 2)])
        tensor(0.2500)
    """
    features, targets = list(features), list(targets)
    if not features:
        raise ValueError("features: expected at least one layer, got none")
    weights = [1 / len(features)] * len(features) if weights is None else [float(w) for w in weights]
    for name, values in (("targets", targets), ("weights", weights)):
        if len(values) != len(features):
            raise ValueError(f"{name}: expected one for each of {len(features)} layers, got {len(values)}")
    for i, f in enumerate(features):
        check_floating(f"features[{i}]", f)
        check_shape(f"features[{i}]", f, ("N", "C", "H", "W"))
        if f.dtype != features[0].dtype:
            raise TypeError(f"features[{i}]: expected the dtype of features[0], {features[0].dtype}, got {f.dtype}")
        check_floating(f"targets[{i}]", targets[i])
        targets[i] = targets[i][None] if targets[i].dim() == 2 else targets[i]
        if targets[i].dim() != 3 or targets[i].shape[0] != 1:
            check_shape(f"targets[{i}]", targets[i], (f.shape[0], f.shape[1], f.shape[1]))
        check_shape(f"targets[{i}]", targets[i], ("1 or N", f.shape[1], f.shape[1]))
        for name, tensor in ((f"features[{i}]", f), (f"targets[{i}]", targets[i])):
            check_same_device(name, tensor, "features[0]", features[0])
    return torch.ops.fastcv.style_loss(features, targets, weights)[0]


# ---- fake kernels --------------------------------------------------------------------------------


def _sum_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


@torch.library.register_fake("fastcv::gram_matrix", lib=LIBRARY)
def _(features, normalize):
    return features.new_empty(features.shape[0], features.shape[1], features.shape[1])


@torch.library.register_fake("fastcv::gram_matrix_backward", lib=LIBRARY)
def _(grad, features, normalize):
    return torch.empty(
        features.shape,
        dtype=features.dtype,
        device=features.device,
        memory_format=torch._prims_common.suggest_memory_format(features),
    )


@torch.library.register_fake("fastcv::style_loss", lib=LIBRARY)
def _(features, targets, weights):
    differences = [f.new_empty(f.shape[0], f.shape[1], f.shape[1], dtype=_sum_dtype(f)) for f in features]
    return [features[0].new_empty((), dtype=_sum_dtype(features[0])), *differences]


# ---- derivatives: G = scale * F F^T is bilinear, and so is its gradient scale * (grad + grad^T) F ---------


def _symmetric_cross(a: Tensor, b: Tensor, normalize: str, dtype: torch.dtype) -> Tensor:
    product = cross(a, b, normalize)
    return (product + product.mT).to(dtype)


def _save(ctx, inputs, output):
    *tensors, ctx.normalize = inputs
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _backward_of_gram(ctx, grad):
    return torch.ops.fastcv.gram_matrix_backward(grad, *ctx.saved_tensors, ctx.normalize), None


def _jvp_of_gram(ctx, tangent, _):
    (features,) = ctx.saved_tensors
    return _symmetric_cross(tangent, features, ctx.normalize, features.dtype)


def _backward_of_gradient(ctx, grad):
    of_gram, features = ctx.saved_tensors
    needs = ctx.needs_input_grad
    first = _symmetric_cross(grad, features, ctx.normalize, of_gram.dtype) if needs[0] else None
    second = torch.ops.fastcv.gram_matrix_backward(of_gram, grad, ctx.normalize) if needs[1] else None
    return first, second, None


def _jvp_of_gradient(ctx, *tangents):
    of_gram, features = ctx.saved_tensors
    product = torch.ops.fastcv.gram_matrix_backward
    terms = [] if tangents[0] is None else [product(tangents[0], features, ctx.normalize)]
    if tangents[1] is not None:
        terms.append(product(of_gram, tangents[1], ctx.normalize))
    return sum(terms[1:], terms[0])


register_autograd("gram_matrix", setup_context=_save, backward=_backward_of_gram, jvp=_jvp_of_gram)
register_autograd("gram_matrix_backward", setup_context=_save, backward=_backward_of_gradient, jvp=_jvp_of_gradient)


# The loss is sum of w / (4 N) * D^2 over the differences D = G - A, which the operator returns as well: what the loss's
# gradient needs is saved as they are, and derivatives of them follow.


def _save_style(ctx, inputs, output):
    features, targets, ctx.weights = inputs
    ctx.layers = len(features)
    ctx.target_dtypes = [t.dtype for t in targets]
    ctx.single = [t.shape[0] == 1 for t in targets]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*features, *output[1:])
    ctx.save_for_forward(*features, *output[1:])


def _parts(ctx):
    saved = ctx.saved_tensors
    return saved[: ctx.layers], saved[ctx.layers :]


def _backward_of_style(ctx, grads):
    features, differences = _parts(ctx)
    of_loss, *of_differences = grads
    of_features, of_targets = [], []
    for i, (f, d, g, w) in enumerate(zip(features, differences, of_differences, ctx.weights, strict=True)):
        if of_loss is not None:
            term = d * (of_loss * (w / (2 * max(1, d.shape[0]))))
            g = term if g is None else g + term
        wanted = g is not None and ctx.needs_input_grad[0][i]
        of_features.append(torch.ops.fastcv.gram_matrix_backward(g, f, "elements") if wanted else None)
        if g is None or not ctx.needs_input_grad[1][i]:
            of_targets.append(None)
        else:
            of_targets.append(-(g.sum(0, keepdim=True) if ctx.single[i] else g).to(ctx.target_dtypes[i]))
    return of_features, of_targets, None


def _jvp_of_style(ctx, of_features, of_targets, _):
    features, differences = _parts(ctx)
    loss, tangents = None, []
    for f, d, df, dt, w in zip(features, differences, of_features, of_targets, ctx.weights, strict=True):
        tangent = torch.zeros_like(d)
        if df is not None:
            tangent = tangent + _symmetric_cross(df, f, "elements", d.dtype)
        if dt is not None:
            tangent = tangent - dt.to(d.dtype)
        term = (d * tangent).sum() * (w / (2 * max(1, d.shape[0])))
        loss = term if loss is None else loss + term
        tangents.append(tangent)
    return [loss, *tangents]


register_autograd("style_loss", setup_context=_save_style, backward=_backward_of_style, jvp=_jvp_of_style)


# ---- vmap: the mapped dimension joins the images ---------------------------------------------------


def _vmap(info, in_dims, *arguments):
    *tensors, normalize = arguments
    size = info.batch_size
    operator = torch.ops.fastcv.gram_matrix if len(tensors) == 1 else torch.ops.fastcv.gram_matrix_backward
    folded = [front(t, d, size).flatten(0, 1) for t, d in zip(tensors, in_dims, strict=False)]
    return operator(*folded, normalize).unflatten(0, (size, -1)), 0


torch.library.register_vmap("fastcv::gram_matrix", _vmap, lib=LIBRARY)
torch.library.register_vmap("fastcv::gram_matrix_backward", _vmap, lib=LIBRARY)


def _vmap_style(info, in_dims, features, targets, weights):
    size = info.batch_size
    features = [front(f, d, size) for f, d in zip(features, in_dims[0], strict=True)]
    folded_targets = []
    for t, d, f in zip(targets, in_dims[1], features, strict=True):
        if d is not None or t.shape[0] != 1:  # one for each image
            t = front(t, d, size)
            t = t.expand(size, f.shape[1], *t.shape[2:]).flatten(0, 1)
        folded_targets.append(t)
    results = torch.ops.fastcv.style_loss([f.flatten(0, 1) for f in features], folded_targets, weights)
    # Its loss is the mean over all images: those of the samples follow from the differences.
    differences = [d.unflatten(0, f.shape[:2]) for d, f in zip(results[1:], features, strict=True)]
    terms = zip(differences, weights, strict=True)
    losses = [(d * d).sum((1, 2, 3)) * (w / (4 * max(1, d.shape[1]))) for d, w in terms]
    return [sum(losses[1:], losses[0]), *differences], [0] * (1 + len(differences))


torch.library.register_vmap("fastcv::style_loss", _vmap_style, lib=LIBRARY)
