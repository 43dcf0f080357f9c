"""gram_matrix and style_loss: by hand, against float64, derivatives, machinery, errors."""

import pytest
import torch
from torch.library import opcheck

import fastcv
from fastcv import reference

FORMATS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NORMALIZE = (True, False, "positions")

# images, channels, height, width: tails of lanes, tiles, panels, chunks and splits
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (1, 16, 4, 4),
    (3, 17, 9, 1),
    (1, 64, 40, 43),
    (1, 65, 3, 11),
    (2, 100, 19, 23),
    (1, 130, 50, 41),
    (40, 20, 6, 6),
    (1, 272, 2, 3),
]


def features(shape=(2, 5, 3, 4), dtype=torch.float64, memory_format=torch.contiguous_format, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=memory_format)


def loss_of(*tensors, weights=(0.7, 1.9)):
    half = len(tensors) // 2
    return fastcv.ops.style_loss(tensors[:half], tensors[half:], weights)


def layers(dtype=torch.float64):
    shapes = ((2, 3, 2, 3), (2, 4, 1, 3))
    maps = [features(s, dtype, f, i).requires_grad_() for i, (s, f) in enumerate(zip(shapes, FORMATS, strict=True))]
    targets = [
        torch.randn(n, c, c, generator=torch.Generator().manual_seed(c), dtype=dtype) for n, c in ((1, 3), (2, 4))
    ]
    return [*maps, *(t.requires_grad_() for t in targets)]


def test_by_hand():
    """Gatys et al. 2016, equation 3: G_ij = sum_k F_ik F_jk, with F = [[1, 2, 0], [3, -1, 2]]."""
    x = torch.tensor([[1.0, 2, 0], [3, -1, 2]]).reshape(1, 2, 1, 3)
    gram = torch.tensor([[[5.0, 1], [1, 14]]])
    assert torch.equal(fastcv.ops.gram_matrix(x, normalize=False), gram)
    assert torch.allclose(fastcv.ops.gram_matrix(x, normalize="positions"), gram / 3)
    assert torch.allclose(fastcv.ops.gram_matrix(x), gram / 6)


def test_style_loss_by_hand():
    """Equation 4: 1 / (4 N^2 M^2) times the squared differences of unnormalised Gram matrices, N = 2, M = 3."""
    x = torch.tensor([[1.0, 2, 0], [3, -1, 2]]).reshape(1, 2, 1, 3)
    style = torch.tensor([[1.0, 1, 1], [0, 0, 2]]).reshape(1, 2, 1, 3)  # G = [[3, 2], [2, 4]]
    expected = (2**2 + 1 + 1 + 10**2) / (4 * 2**2 * 3**2)
    target = fastcv.ops.gram_matrix(style)[0]
    assert fastcv.ops.style_loss([x], [target]).item() == pytest.approx(expected)
    assert fastcv.ops.style_loss([x, x], [target, target], [1, 3]).item() == pytest.approx(4 * expected)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(shape, dtype, memory_format):
    x = features(shape, dtype, memory_format)
    for normalize, name in zip(NORMALIZE, ("elements", "none", "positions"), strict=True):
        gram = fastcv.ops.gram_matrix(x, normalize=normalize)
        expected = reference.gram_matrix.gram_matrix(x.double(), name)
        assert gram.dtype == dtype and torch.equal(gram, gram.mT)
        assert close(gram, expected, dtype)
    grad = features((shape[0], shape[1], shape[1], 1), dtype, seed=1)[..., 0]
    actual = torch.ops.fastcv.gram_matrix_backward(grad, x, "positions")
    expected = reference.gram_matrix.gram_matrix_backward(grad.double(), x.double(), "positions")
    assert actual.dtype == dtype and actual.is_contiguous(memory_format=memory_format)
    assert close(actual, expected, dtype)


def close(actual, expected, dtype):
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-14}.get(dtype, torch.finfo(dtype).eps)
    return ((actual.double() - expected).abs().max() <= tolerance * expected.abs().max()).item()


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 3, 3), (2, 3, 0, 4)])
def test_empty(shape):
    x = torch.zeros(shape, requires_grad=True)
    gram = fastcv.ops.gram_matrix(x)
    assert gram.shape == (shape[0], shape[1], shape[1]) and not gram.any()
    gram.sum().backward()
    assert x.grad.shape == shape
    assert fastcv.ops.style_loss([x], [torch.zeros(1, shape[1], shape[1])]) == 0


def test_strides():
    x = features((2, 20, 11, 18), torch.float32)
    for view in (
        x[:, ::2],
        x[..., ::3],
        x[:, :, 2:9, 1:5],
        x.transpose(2, 3),
        x.mT.contiguous().mT,
        x[:1].expand(3, 20, 11, 18),
    ):
        dense = view.contiguous()
        torch.testing.assert_close(fastcv.ops.gram_matrix(view), fastcv.ops.gram_matrix(dense), rtol=1e-6, atol=1e-7)
        grad = torch.randn(view.shape[0], view.shape[1], 1).expand(-1, -1, view.shape[1])
        of = torch.ops.fastcv.gram_matrix_backward
        torch.testing.assert_close(of(grad, view, "none"), of(grad.contiguous(), dense, "none"), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("channels", [3, 16, 70])
@pytest.mark.parametrize("height, width", [(6, 10), (7, 9), (40, 34), (1, 2)])
def test_bfloat16_layouts(channels, height, width):
    """Neighbours that are words, multiplied in pairs, and those that are not."""
    x = features((2, channels + 1, height + 2, width + 3), torch.bfloat16)
    for view in (
        x[:, :channels, :height, :width].contiguous(),
        x[:, :channels, :height, :width],
        x[:, 1:, 1 : height + 1, 1 : width + 1],
        x[:, :channels, :, :width].contiguous(memory_format=torch.channels_last),
    ):
        flat = view.double().flatten(2)
        expected = flat @ flat.mT / (view.shape[2] * view.shape[3])
        actual = fastcv.ops.gram_matrix(view, normalize="positions")
        assert torch.equal(actual, actual.mT)
        assert close(actual, expected, torch.bfloat16)


def test_half_types_do_not_overflow():
    """A sum of 2^16 products of 8 * 8 is beyond float16; divided first it is 64 / 2."""
    x = torch.full((1, 2, 256, 256), 8.0, dtype=torch.float16)
    assert fastcv.ops.gram_matrix(x).tolist() == [[[32, 32], [32, 32]]]
    assert fastcv.ops.gram_matrix(x, normalize=False).isinf().all()
    assert fastcv.ops.style_loss([x], [torch.zeros(2, 2)]).item() == 4 * 32**2 / 4


def test_special_values():
    x = features((1, 40, 5, 6), torch.float32)
    x[0, 7, 2, 2] = float("nan")
    gram = fastcv.ops.gram_matrix(x)[0]
    touched = torch.zeros(40, 40, dtype=torch.bool)
    touched[7] = touched[:, 7] = True
    assert torch.equal(gram.isnan(), touched)


def test_same_for_any_number_of_threads():
    x = features((1, 48, 70, 90), torch.float32).requires_grad_()
    target = torch.zeros(48, 48)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = fastcv.ops.style_loss([x], [target])
            results.append((fastcv.ops.gram_matrix(x), loss, *torch.autograd.grad(loss, x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_style_loss_reference(dtype):
    tensors = layers(dtype)
    loss = loss_of(*tensors)
    gradients = torch.autograd.grad(loss, tensors)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = reference.gram_matrix.style_loss(exact[:2], exact[2:], [0.7, 1.9])[0]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for t, actual, oracle in zip(tensors, gradients, torch.autograd.grad(expected, exact), strict=True):
        assert actual.dtype == dtype and actual.shape == t.shape
        assert close(actual, oracle, dtype)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_derivatives(memory_format):
    x = features((2, 3, 2, 3), memory_format=memory_format).requires_grad_()
    for normalize in NORMALIZE:

        def gram(x, normalize=normalize):
            return fastcv.ops.gram_matrix(x, normalize=normalize)

        assert torch.autograd.gradcheck(gram, x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(gram, x)
    assert torch.func.hessian(lambda x: (fastcv.ops.gram_matrix(x) ** 2).sum())(x).abs().sum() > 0
    grad = features((2, 3, 3, 1))[..., 0].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda g, x: torch.ops.fastcv.gram_matrix_backward(g, x, "none"), (grad, x), check_forward_ad=True
    )


def test_style_loss_derivatives():
    tensors = layers()
    assert torch.autograd.gradcheck(loss_of, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss_of, tensors)
    only = fastcv.ops.style_loss(tensors[:2], [t.detach() for t in tensors[2:]])
    assert all(g is not None for g in torch.autograd.grad(only, tensors[:2]))


def test_opcheck():
    for memory_format in FORMATS:
        x = features(memory_format=memory_format).requires_grad_()
        opcheck(torch.ops.fastcv.gram_matrix, (x, "elements"))
        grad = features((2, 5, 5, 1))[..., 0].requires_grad_()
        opcheck(torch.ops.fastcv.gram_matrix_backward, (grad, x, "positions"))
    tensors = layers()
    opcheck(torch.ops.fastcv.style_loss, (tensors[:2], tensors[2:], [0.5, 2.0]))


def test_compile():
    tensors = layers()
    for function, arguments in ((fastcv.ops.gram_matrix, tensors[:1]), (loss_of, tensors)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        actual, expected = compiled(*arguments), function(*arguments)
        assert torch.equal(actual, expected)
        for a, b in zip(
            torch.autograd.grad(actual.sum(), arguments), torch.autograd.grad(expected.sum(), arguments), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_vmap():
    x = torch.stack([features(seed=i) for i in range(3)])
    expected = torch.stack([fastcv.ops.gram_matrix(s) for s in x])
    torch.testing.assert_close(torch.func.vmap(fastcv.ops.gram_matrix)(x), expected)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: (fastcv.ops.gram_matrix(x) ** 3).sum()))(x)
    expected = torch.stack([torch.func.grad(lambda x: (fastcv.ops.gram_matrix(x) ** 3).sum())(s) for s in x])
    torch.testing.assert_close(per_sample, expected)


@pytest.mark.parametrize("dims", [(0, None), (0, 0), (None, 0)], ids=str)
@pytest.mark.parametrize("single", [False, True])
def test_vmap_of_style_loss(dims, single):
    torch.manual_seed(0)
    samples, images = 4, 2
    first, second = torch.randn(samples, images, 3, 4, 5), torch.randn(samples, images, 6, 2, 2)
    targets = torch.randn(samples, 1 if single else images, 3, 3)
    fixed = torch.randn(6, 6)

    def loss(f, t):
        return fastcv.ops.style_loss([f, second[0]], [t, fixed], [0.5, 2.0])

    arguments = [a if d == 0 else a[0] for a, d in zip((first, targets), dims, strict=True)]
    each = [[a[i] if d == 0 else a for a, d in zip(arguments, dims, strict=True)] for i in range(samples)]
    torch.testing.assert_close(torch.func.vmap(loss, dims)(*arguments), torch.stack([loss(*e) for e in each]))
    gradient = torch.func.grad(loss, argnums=(0, 1))
    actual = torch.func.vmap(gradient, dims)(*arguments)
    for a, *expected in zip(actual, *(gradient(*e) for e in each), strict=True):
        torch.testing.assert_close(a, torch.stack(expected))


def test_errors():
    x = torch.zeros(2, 3, 4, 5)
    for bad, error, match in (
        (lambda: fastcv.ops.gram_matrix(x[0]), ValueError, "features: expected shape"),
        (lambda: fastcv.ops.gram_matrix(x.int()), TypeError, "features"),
        (
            lambda: fastcv.ops.gram_matrix(x, normalize="elements"),
            ValueError,
            'normalize: expected True, False or "pos',
        ),
        (lambda: fastcv.ops.style_loss([], []), ValueError, "features: expected at least one"),
        (lambda: fastcv.ops.style_loss([x], []), ValueError, "targets: expected one for each of 1 layers, got 0"),
        (lambda: fastcv.ops.style_loss([x], [torch.zeros(3, 3)], [1, 2]), ValueError, "weights"),
        (lambda: fastcv.ops.style_loss([x], [torch.zeros(4, 3)]), ValueError, r"targets\[0\]: expected shape"),
        (lambda: fastcv.ops.style_loss([x], [torch.zeros(3, 3, 3)]), ValueError, r"targets\[0\]: expected shape"),
        (
            lambda: fastcv.ops.style_loss([x, x.double()], [torch.zeros(3, 3)] * 2),
            TypeError,
            r"features\[1\]: expected the dtype",
        ),
        (lambda: torch.ops.fastcv.gram_matrix_backward(x[0], x, "none"), RuntimeError, "grad: expected shape"),
        (lambda: torch.ops.fastcv.gram_matrix(x, "all"), (RuntimeError, KeyError), "normalize|all"),
    ):
        with pytest.raises(error, match=match):
            bad()
