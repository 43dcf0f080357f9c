"""conv2d: by hand, against float64 over awkward shapes and layouts, kernels by name, derivatives, machinery, errors."""

import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import fastcv
from fastcv._library import implementation
from fastcv.ops._layouts import kept
from fastcv.ops.conv2d import ACTIVATIONS, KERNELS, _input_gradient_kernel, _training_kernel
from fastcv.reference.conv2d import ACTIVATIONS as FORMULAS

compiled_only = pytest.mark.skipif(
    implementation("conv2d", "cpu") != "compiled",
    reason="of the compiled kernels; the reference is torch's convolution",
)
FORMATS = (torch.contiguous_format, torch.channels_last)

# images, channels, height, width, outputs, kernel, stride, padding, dilation, groups
SHAPES = [
    (1, 3, 20, 22, 64, (7, 7), 2, 3, 1, 1),
    (1, 3, 33, 31, 20, (11, 11), 4, 2, 1, 1),
    (2, 64, 14, 14, 130, (1, 1), 1, 0, 1, 1),
    (2, 40, 7, 9, 24, (1, 1), 2, 0, 1, 1),
    (1, 24, 5, 5, 17, (1, 1), 1, 1, 1, 1),
    (1, 17, 9, 30, 40, (3, 3), 1, 1, 1, 1),
    (1, 64, 21, 19, 64, (3, 3), 1, 1, 1, 1),
    (2, 33, 7, 7, 65, (3, 3), 1, 0, 1, 1),
    (1, 128, 4, 4, 128, (3, 3), 1, 2, 1, 1),
    (1, 300, 7, 7, 200, (3, 3), 2, 1, 1, 1),
    (1, 16, 12, 12, 16, (3, 5), 1, 2, 2, 1),
    (2, 33, 9, 11, 40, (2, 2), 1, 1, 1, 1),
    (1, 32, 13, 10, 36, (3, 2), 1, 0, 1, 1),
    (3, 40, 6, 17, 32, (1, 3), 1, (0, 1), 1, 1),
    (1, 32, 8, 7, 48, (2, 1), 1, 0, 1, 1),
    (1, 8, 9, 9, 8, (5, 1), (1, 2), (2, 0), 1, 1),
    (1, 2, 1, 1, 3, (1, 1), 1, 0, 1, 1),
    (1, 40, 6, 200, 33, (3, 3), 1, 1, 1, 1),
    (1, 32, 15, 13, 48, (3, 3), 2, 1, 1, 2),
    (1, 16, 19, 23, 24, (3, 3), 1, 2, 2, 1),
    (2, 8, 7, 10, 8, (3, 3), 1, (4, 12), (4, 12), 1),
    (1, 20, 9, 30, 8, (3, 3), 1, (1, 3), (1, 3), 1),
    (2, 33, 11, 13, 40, (5, 5), 1, 2, 1, 1),
    (1, 16, 30, 9, 65, (5, 5), 1, (0, 1), 1, 1),
    (1, 24, 17, 19, 24, (5, 5), 1, (4, 6), (2, 3), 1),
    (2, 16, 11, 10, 16, (3, 3), 1, 1, 1, 4),
    (1, 64, 9, 9, 32, (3, 3), 1, 1, 1, 16),
    (1, 24, 9, 9, 48, (3, 3), 2, 1, 1, 3),
    (1, 24, 17, 19, 24, (3, 3), 1, 1, 1, 3),
    (2, 40, 9, 12, 40, (3, 3), 2, 1, 1, 10),
    (1, 38, 8, 8, 38, (2, 3), 1, 0, 1, 19),
    (2, 37, 12, 13, 37, (3, 3), 1, 1, 1, 37),
    (1, 72, 15, 14, 72, (5, 5), 2, 2, 1, 72),
    (1, 16, 9, 9, 16, (7, 7), 1, 3, 1, 16),
    (1, 16, 9, 9, 16, (3, 3), 1, 2, 2, 16),
    (1, 16, 9, 9, 32, (3, 3), 1, 1, 1, 16),
    (1, 16, 3, 2, 16, (3, 3), 1, 1, 1, 16),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def case(shape, seed=0, dtype=torch.float32):
    n, c, h, w, k, kernel, stride, padding, dilation, groups = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, h, w, generator=generator, dtype=dtype)
    weight = torch.randn(k, c // groups, *kernel, generator=generator, dtype=dtype)
    bias = torch.randn(k, generator=generator, dtype=dtype)
    return x, weight, bias, stride, padding, dilation, groups


def error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def serves(kernel, shape):
    x, weight, _, stride, padding, dilation, groups = case(shape)
    try:
        fastcv.ops.conv2d(x, weight, None, stride, padding, dilation, groups, kernel=kernel)
    except RuntimeError as failure:
        assert "does not serve" in str(failure)
        return False
    return True


def test_by_hand():
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    weight = torch.tensor([[[[1.0, 0], [0, -1]]]])
    assert fastcv.ops.conv2d(x, weight).flatten().tolist() == [-4, -4, -4, -4]
    out = fastcv.ops.conv2d(x, weight, torch.tensor([2.0]), residual=x[..., :2, :2], activation="relu")
    assert out.flatten().tolist() == [0, 0, 1, 2]
    assert fastcv.ops.conv2d(x, weight, stride=2, padding=1).flatten().tolist() == [0, -2, -6, -4]


@pytest.mark.parametrize(
    ("shape", "kernel"), [(s, k) for s in SHAPES for k in ("auto", *KERNELS) if serves(k, s)], ids=str
)
def test_reference(shape, kernel):
    x, weight, bias, *geometry = case(shape)
    if kernel == "bf16":  # exact, but for the rounding of its operands
        x, weight = x.bfloat16().float(), weight.bfloat16().float()
    expected = F.conv2d(x.double(), weight.double(), bias.double(), *geometry)
    residual = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    tolerance = 5e-5 if kernel in ("winograd_6x6", "winograd_5x5_4x4") else 1e-5
    for memory_format in FORMATS:
        y = x.contiguous(memory_format=memory_format)
        actual = fastcv.ops.conv2d(y, weight, bias, *geometry, kernel=kernel)
        assert actual.dtype == torch.float32 and actual.is_contiguous(memory_format=memory_format)
        assert error(actual, expected) < tolerance
        actual = fastcv.ops.conv2d(y, weight, None, *geometry, residual=residual, activation="silu", kernel=kernel)
        without_bias = F.conv2d(x.double(), weight.double(), None, *geometry)
        assert error(actual, F.silu(without_bias + residual)) < tolerance


@compiled_only
def test_each_kernel_serves_something():
    chosen = set()
    for shape in SHAPES:
        x, weight, _, stride, padding, dilation, groups = case(shape)
        two = [[v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation)]
        chosen.add(KERNELS[torch.ops.fastcv.conv2d_kernel(x, weight, groups, *two)])
    assert chosen >= {"gemm", "winograd", "winograd_5x5", "depthwise", "grouped"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("outputs", [20, 64])
def test_activations(activation, outputs):
    x, weight, bias, *geometry = case((1, 24, 6, 7, outputs, (1, 1), 1, 0, 1, 1))
    before = F.conv2d(x.double(), weight.double(), bias.double(), *geometry)
    actual = fastcv.ops.conv2d(x, weight, bias, *geometry, activation=activation, negative_slope=0.2)
    assert error(actual, FORMULAS[activation](before, 0.2)) < 1e-5
    x[0, :, 2, 3] = float("nan")
    actual = fastcv.ops.conv2d(x, weight, bias, *geometry, activation=activation)
    assert actual[0, :, 2, 3].isnan().all() and actual.isnan().sum() == outputs


def test_scale_and_shift():
    x, weight, bias, *geometry = case(SHAPES[5])
    generator = torch.Generator().manual_seed(1)
    scale, shift = torch.rand(40, generator=generator) + 0.5, torch.randn(40, generator=generator)
    expected = F.conv2d(x, weight, bias, *geometry) * scale[:, None, None] + shift[:, None, None]
    actual = fastcv.ops.conv2d(x, weight, bias, *geometry, scale=scale, shift=shift)
    assert error(actual, expected.double()) < 1e-5


@pytest.mark.parametrize("shape", SHAPES[2:9])
def test_slices_of_wider_maps(shape):
    """Input and residual whose pixels are further apart than their channels."""
    x, weight, bias, *geometry = case(shape)
    wide = torch.randn(x.shape[0], x.shape[1] + 5, x.shape[2], x.shape[3] + 3).contiguous(
        memory_format=torch.channels_last
    )
    wide[:, 2 : 2 + x.shape[1], :, 1 : 1 + x.shape[3]] = x
    sliced = wide[:, 2 : 2 + x.shape[1], :, 1 : 1 + x.shape[3]]
    expected = F.conv2d(x.double(), weight.double(), bias.double(), *geometry)
    residual = torch.randn(expected.shape[0], 2 * expected.shape[1], *expected.shape[2:])
    residual = residual.contiguous(memory_format=torch.channels_last)[:, 1 : 1 + expected.shape[1]]
    actual = fastcv.ops.conv2d(sliced, weight, bias, *geometry, residual=residual)
    assert error(actual, expected + residual) < 1e-5


def test_empty_batch():
    assert fastcv.ops.conv2d(torch.ones(0, 3, 8, 8), torch.ones(5, 3, 3, 3)).shape == (0, 5, 6, 6)


@pytest.mark.parametrize("magnitude", [1e-6, 1e6])
def test_bad_scaling(magnitude):
    x, weight, _, *geometry = case(SHAPES[6])
    for a, b in ((magnitude, 1.0), (1.0, magnitude), (magnitude, 1 / magnitude)):
        expected = F.conv2d(x.double() * a, weight.double() * b, None, *geometry)
        assert error(fastcv.ops.conv2d(x * a, weight * b, None, *geometry), expected) < 1e-5


@pytest.mark.parametrize("shape", SHAPES[:4] + SHAPES[6:7] + SHAPES[15:20])
def test_same_for_any_number_of_threads(shape):
    x, weight, bias, *geometry = case(shape)
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(fastcv.ops.conv2d(x, weight, bias, *geometry))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_changed_weights_are_noticed():
    x, weight, _, *geometry = case(SHAPES[6])

    def conv(w):
        return fastcv.ops.conv2d(x, w, None, *geometry)

    expected, layer = conv(weight), torch.nn.Parameter(weight.clone())
    with torch.no_grad():
        assert torch.equal(conv(layer), expected)
        layer.mul_(2)
        assert torch.equal(conv(layer), 2 * expected)
        layer.data = weight.clone()
        assert torch.equal(conv(layer), expected)
    with torch.inference_mode():
        made_here = weight.clone()
        assert torch.equal(conv(made_here), expected)
        made_here.mul_(2)
        assert torch.equal(conv(made_here), 2 * expected)


@compiled_only
def test_weights_are_prepared_once_and_forgotten_with_their_tensor():
    gc.collect()
    x, weight, bias, *geometry = case(SHAPES[6])
    fastcv.ops.conv2d(x, weight, bias, *geometry)
    (first,) = kept[weight][1].values()
    fastcv.ops.conv2d(x, weight, bias, *geometry)
    assert [p is first for p in kept[weight][1].values()] == [True]
    count = len(kept)
    del weight
    gc.collect()
    assert len(kept) == count - 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_follow_the_formulas(activation):
    x, weight, bias, *geometry = case((2, 6, 5, 6, 4, (3, 3), 1, 1, 1, 2))
    residual = torch.randn(2, 4, 5, 6)
    arguments = [t.requires_grad_() for t in (x, weight, bias, residual)]
    out = fastcv.ops.conv2d(x, weight, bias, *geometry, residual=residual, activation=activation)
    before = F.conv2d(x, weight, bias, *geometry) + residual
    # torch's own hardsigmoid has no second derivative.
    expected = F.relu6(before + 3) / 6 if activation == "hardsigmoid" else FORMULAS[activation](before, 0.01)
    v = torch.randn_like(out)
    first = torch.autograd.grad((out * v).sum(), arguments, create_graph=True)
    first_expected = torch.autograd.grad((expected * v).sum(), arguments, create_graph=True)
    torch.testing.assert_close(first, first_expected, rtol=1e-3, atol=1e-4)
    u = [torch.randn_like(t) for t in arguments]

    def dot(ts):
        return sum((a * b).sum() for a, b in zip(ts, u, strict=True))

    second = torch.autograd.grad(dot(first), arguments, allow_unused=True, materialize_grads=True)
    second_expected = torch.autograd.grad(dot(first_expected), arguments, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(second, second_expected, rtol=1e-3, atol=2e-3)
    _, tangent = torch.func.jvp(
        lambda x, w, b, r: fastcv.ops.conv2d(x, w, b, *geometry, residual=r, activation=activation),
        tuple(t.detach() for t in arguments),
        tuple(u),
    )
    assert abs(((tangent * v).sum() - dot(first_expected)).item()) < 1e-2 * max(1, abs(dot(first_expected).item()))


# ---- training --------------------------------------------------------------------------------------------------------

# images, channels, outputs, height, width, padding; large enough that training runs on fastcv's kernels
TRAINED = [(8, 64, 64, 34, 31, 1), (8, 80, 64, 33, 36, 0), (6, 70, 82, 31, 32, 2), (12, 128, 112, 14, 14, (2, 1))]


def trained_case(shape, memory_format=torch.contiguous_format):
    n, c, k, h, w, padding = shape
    x = torch.randn(n, c, h, w).contiguous(memory_format=memory_format).requires_grad_()
    weight = (torch.randn(k, c, 3, 3) / (9 * c) ** 0.5).contiguous(memory_format=memory_format).requires_grad_()
    return x, weight, torch.randn(k, requires_grad=True), padding


def gradients(conv, x, weight, bias, padding, **options):
    out = conv(x, weight, bias, 1, padding, **options)
    v = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return torch.autograd.grad((out * v).sum(), [x, weight, bias])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", TRAINED, ids=str)
def test_gradients_in_training(shape, memory_format):
    x, weight, bias, padding = trained_case(shape, memory_format)
    out = fastcv.ops.conv2d(x, weight, bias, padding=padding)
    if implementation("conv2d", "cpu") == "compiled":
        p = [padding] * 2 if isinstance(padding, int) else list(padding)
        assert "Convolution" not in type(out.grad_fn).__name__ and out.is_contiguous(memory_format=memory_format)
        assert _input_gradient_kernel(out, weight, (1, [1, 1], p, [1, 1])) in ("winograd", "winograd_2x2")
    actual = gradients(fastcv.ops.conv2d, x, weight, bias, padding)
    double = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    assert error(out, F.conv2d(*double, 1, padding)) < 1e-5
    for a, b in zip(actual, gradients(F.conv2d, *double, padding), strict=True):
        assert error(a, b) < 1e-5
    again = gradients(fastcv.ops.conv2d, x, weight, bias, padding)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


# The last two are those for which more or fewer threads would make another kernel faster.
@compiled_only
@pytest.mark.parametrize("shape", [*TRAINED, (1, 64, 64, 40, 40, 1), (2, 64, 64, 40, 40, 1)], ids=str)
def test_training_is_the_same_for_any_number_of_threads(shape):
    x, weight, bias, padding = trained_case(shape, torch.channels_last)
    threads, kernels, results = torch.get_num_threads(), [], []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        out = fastcv.ops.conv2d(x, weight, bias, padding=padding)
        kernel = _input_gradient_kernel(out, weight, (1, [1, 1], [1, 1], [1, 1]))
        kernels.append((type(out.grad_fn).__name__, kernel))
        results.append((out, *gradients(fastcv.ops.conv2d, x, weight, bias, padding)[:1]))
    torch.set_num_threads(threads)
    assert kernels[0] == kernels[1] == kernels[2]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_epilogue_in_training():
    x, weight, bias, _ = trained_case(TRAINED[0])
    residual = torch.randn(8, 64, 34, 31, requires_grad=True)
    out = fastcv.ops.conv2d(x, weight, bias, padding=1, residual=residual, activation="silu")
    double = [t.detach().double().requires_grad_() for t in (x, weight, bias, residual)]
    expected = F.silu(F.conv2d(*double[:3], 1, 1) + double[3])
    v = torch.randn_like(out)
    first = torch.autograd.grad((out * v).sum(), [x, weight, bias, residual])
    for a, b in zip(first, torch.autograd.grad((expected * v).sum(), double), strict=True):
        assert error(a, b) < 1e-5


def test_trained_convolutions_are_differentiable_twice_and_forward():
    def derivatives(conv, x, weight, bias):
        first = torch.autograd.grad((conv(x, weight, bias) ** 2).sum(), [x, weight, bias], create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), [x, weight, bias])

    x, weight, bias, padding = trained_case(TRAINED[2])
    double = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    actual = derivatives(lambda *a: fastcv.ops.conv2d(*a, padding=padding), x, weight, bias)
    expected = derivatives(lambda *a: F.conv2d(*a, padding=padding), *double)
    for mine, theirs in zip(actual, expected, strict=True):
        assert error(mine, theirs) < 5e-5
    tangents = [torch.randn_like(t) for t in (x, weight, bias)]
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, u) for t, u in zip((x, weight, bias), tangents, strict=True)]
        out = fastcv.ops.conv2d(*duals, padding=padding)
        tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
    d_x, d_weight, d_bias = (t.double() for t in tangents)
    expected = F.conv2d(d_x, double[1], d_bias, padding=2) + F.conv2d(double[0], d_weight, padding=2)
    assert error(tangent, expected) < 1e-5


@pytest.mark.parametrize("kernel", ["gemm", "winograd", "winograd_2x2"])
@pytest.mark.parametrize("padding", [(0, 0), (1, 2), (2, 1)])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_input_gradient(kernel, padding, memory_format):
    """The operator below: its own derivatives too, as it is linear in each argument."""
    grad = torch.randn(2, 70, 7, 9).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(70, 19, 3, 3, requires_grad=True)
    double = [t.detach().double().requires_grad_() for t in (grad, weight)]
    out = torch.ops.fastcv.conv2d_input_gradient(grad, weight, padding, kernel)
    expected = F.conv_transpose2d(*double, padding=padding)
    assert error(out, expected) < 1e-5 and out.is_contiguous(memory_format=memory_format)
    v = torch.randn_like(out)
    first = torch.autograd.grad((out * v).sum(), [grad, weight])
    for a, b in zip(first, torch.autograd.grad((expected * v).sum(), double), strict=True):
        assert error(a, b) < 1e-5
    tangents = torch.randn_like(grad), torch.randn_like(weight)
    _, tangent = torch.func.jvp(
        lambda g, w: torch.ops.fastcv.conv2d_input_gradient(g, w, padding, kernel),
        (grad.detach(), weight.detach()),
        tangents,
    )
    expected = F.conv_transpose2d(tangents[0].double(), double[1], padding=padding)
    expected = expected + F.conv_transpose2d(double[0], tangents[1].double(), padding=padding)
    assert error(tangent, expected) < 1e-5


def test_input_gradient_opcheck_and_errors():
    grad = torch.randn(2, 6, 5, 7, requires_grad=True)
    weight = torch.randn(6, 4, 3, 3, requires_grad=True)
    opcheck(torch.ops.fastcv.conv2d_input_gradient, (grad, weight, [1, 0], "gemm"))
    assert torch.ops.fastcv.conv2d_input_gradient(grad[:0], weight, [1, 1], "gemm").shape == (0, 4, 5, 7)
    with pytest.raises(RuntimeError, match=r"padding|negative"):
        torch.ops.fastcv.conv2d_input_gradient(grad, weight, [-1, 1], "gemm")
    with pytest.raises(RuntimeError, match=r"weight|channels"):
        torch.ops.fastcv.conv2d_input_gradient(grad[:, :5], weight, [1, 1], "gemm")


@compiled_only
def test_winograd_weights_do_not_depend_on_their_layout_or_the_threads():
    weight = torch.randn(200, 20, 3, 3)
    geometry = (1, [1, 1], [1, 1], [1, 1])
    threads, prepared = torch.get_num_threads(), []
    for n in (1, 3):
        torch.set_num_threads(n)
        for memory_format in FORMATS:
            laid_out = weight.contiguous(memory_format=memory_format)
            prepared.append(torch.ops.fastcv.conv2d_prepare(laid_out, *geometry, "winograd"))
    torch.set_num_threads(threads)
    assert all(torch.equal(prepared[0], other) for other in prepared[1:])


def test_where_training_runs():
    """Preparing weights of many channels for few pixels, or anything for a tiny layer, does not pay."""

    def kernel(*shape):
        return _training_kernel(*shape, True, False)

    assert kernel(8, 64, 64, 56, 56) == kernel(8, 256, 256, 28, 28) == "winograd"
    assert kernel(1, 512, 512, 7, 7) == kernel(1, 256, 256, 14, 14) == kernel(8, 16, 16, 8, 8) == "torch"
    assert kernel(0, 64, 64, 56, 56) == "torch"


def test_training_follows_torch():
    """A small network, in which every convolution but the first is large enough: the losses of some steps."""
    target = torch.arange(8) % 5
    x = (torch.randn(8, 3, 24, 24) + target[:, None, None, None]).contiguous(memory_format=torch.channels_last)

    def losses(layer):
        torch.manual_seed(3)
        model = torch.nn.Sequential(
            layer(3, 64, 3, padding=1), torch.nn.ReLU(), layer(64, 64, 3, padding=1), torch.nn.BatchNorm2d(64),
            torch.nn.ReLU(), layer(64, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(), torch.nn.Linear(64, 5),
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            yield loss.item()

    ours, theirs = list(losses(fastcv.nn.Conv2d)), list(losses(torch.nn.Conv2d))
    assert ours == pytest.approx(theirs, rel=1e-3) and ours[-1] < 0.8 * ours[0]


def test_other_types_run_on_torch():
    for dtype in (torch.float64, torch.bfloat16):
        x, weight, bias, *geometry = (t.to(dtype) if isinstance(t, torch.Tensor) else t for t in case(SHAPES[6]))
        actual = fastcv.ops.conv2d(x, weight, bias, *geometry, activation="relu")
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, F.conv2d(x, weight, bias, *geometry).relu())


@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck_and_compile(memory_format):
    x, weight, bias, *_ = case((2, 6, 5, 6, 4, (3, 3), 1, 1, 1, 2))
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    weight.requires_grad_()
    arguments = (x, weight, bias, None, None, 2, [1, 1], [1, 1], [1, 1], "silu", 0.0, "auto")
    if implementation("conv2d", "cpu") != "compiled":
        pytest.skip("the reference is torch's convolution, called directly")
    opcheck(torch.ops.fastcv.conv2d, arguments)

    def f(x):
        return fastcv.ops.conv2d(x, weight, bias, padding=1, groups=2, activation="silu")

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), f(x))


def test_same_padding():
    x, weight, bias, *_ = case(SHAPES[6])
    assert torch.equal(
        fastcv.ops.conv2d(x, weight, bias, padding="same"), fastcv.ops.conv2d(x, weight, bias, padding=1)
    )
    with pytest.raises(ValueError, match="same"):
        fastcv.ops.conv2d(x, weight, bias, stride=2, padding="same")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("size", "dilation"), [((2, 2), 1), ((4, 3), 1), ((3, 4), (2, 3)), ((1, 6), 1)])
def test_same_padding_of_kernels_of_even_size(size, dilation, memory_format):
    x = torch.randn(2, 4, 9, 8).contiguous(memory_format=memory_format).requires_grad_()
    weight, bias, scale = torch.randn(6, 4, *size, requires_grad=True), torch.randn(6), torch.rand(6)
    residual = torch.randn(2, 6, 9, 8)
    for _ in range(2):  # what the first call found is kept
        out = fastcv.ops.conv2d(x, weight, bias, padding="same", dilation=dilation)
        expected = F.conv2d(x, weight, bias, padding="same", dilation=dilation)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert out.is_contiguous(memory_format=memory_format)
    v = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad((y * v).sum(), [x, weight]) for y in (out, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    options = dict(padding="same", dilation=dilation, scale=scale, residual=residual, activation="relu")
    out = fastcv.ops.conv2d(x.detach(), weight.detach(), bias, **options)
    torch.testing.assert_close(out, (expected * scale[:, None, None] + residual).relu(), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(fastcv.ops.conv2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, weight, bias, padding="same", dilation=dilation), expected, rtol=1e-4, atol=1e-4
    )


def test_vmap():
    x, weight, residual = torch.randn(3, 2, 4, 6, 7), torch.randn(5, 4, 3, 3), torch.randn(3, 2, 5, 4, 5)
    weights = torch.randn(3, 5, 4, 3, 3)

    def f(x, weight, residual=None):
        return fastcv.ops.conv2d(x, weight, residual=residual, activation="silu")

    def loss(weight, x):
        return f(x, weight).square().sum()

    vmap, close = torch.func.vmap, torch.testing.assert_close
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of torch's slow way
        each = torch.stack([f(s, weight) for s in x])
        close(vmap(f, (0, None))(x, weight), each)
        close(vmap(f, (1, None))(x.movedim(0, 1), weight), each)
        close(vmap(f, (0, None, 0))(x, weight, residual), torch.stack([f(x[i], weight, residual[i]) for i in range(3)]))
        close(vmap(f)(x, weights), torch.stack([f(x[i], weights[i]) for i in range(3)]))
        close(vmap(f, (None, 0))(x[0], weights), torch.stack([f(x[0], w) for w in weights]))
        close(vmap(vmap(f, (0, None)), (0, None))(x[:, :, None], weight), each[:, :, None])
        gradients = vmap(torch.func.grad(loss), (None, 0))(weight, x)
        close(gradients, torch.stack([torch.func.grad(loss)(weight, s) for s in x]), rtol=1e-4, atol=1e-3)


def test_errors():
    x, weight, bias = torch.ones(1, 4, 5, 5), torch.ones(6, 4, 3, 3), torch.ones(6)
    for wrong, message in (
        (dict(input=x[0]), r"input: expected shape \[N, C, H, W\], got \[4, 5, 5\]"),
        (dict(weight=weight[:, :3]), r"weight: expected shape \[K, 4, KH, KW\], got \[6, 3, 3, 3\]"),
        (dict(bias=bias[:5]), r"bias: expected shape \[6\]"),
        (dict(groups=3), "groups|weight"),
        (dict(stride=0), "stride"),
        (dict(padding=-1), "padding"),
        (dict(activation="tanh"), "activation: expected .* got 'tanh'"),
        (dict(kernel="fft"), "kernel: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            fastcv.ops.conv2d(**(dict(input=x, weight=weight, bias=bias) | wrong))
    with pytest.raises(TypeError, match="weight"):
        fastcv.ops.conv2d(x, weight.int())
    with pytest.raises(RuntimeError, match=r"smaller than the kernel|greater than actual input size"):
        fastcv.ops.conv2d(x[..., :2], weight)
    with pytest.raises(RuntimeError, match=r"residual|size"):
        fastcv.ops.conv2d(x, weight, residual=torch.ones(1, 6, 4, 4))
    fastcv.ops.conv2d(x, weight, stride=1, padding=(1, 1), groups=1)
    for wrong in (dict(stride=1.0), dict(stride=True), dict(padding=(True, 1)), dict(padding=(1.0, 1)),
                  dict(groups=1.0), dict(groups=True)):  # fmt: skip
        with pytest.raises(ValueError, match="expected an int"):
            fastcv.ops.conv2d(x, weight, **(dict(stride=1, padding=(1, 1), groups=1) | wrong))


def test_numbers_too_large():
    """They would overflow, or be looped over for ever."""
    x, weight, huge = torch.ones(1, 4, 5, 5), torch.ones(4, 4, 3, 3), 2**31
    for name in ("stride", "padding", "dilation"):
        for value in (huge, 2**62, 2**63 - 1, (1, huge)):
            with pytest.raises(ValueError, match=rf"{name}: expected .* at most 2147483647"):
                fastcv.ops.conv2d(x, weight, **{name: value})


@compiled_only
@pytest.mark.parametrize("kernel", ["gemm", "winograd", "depthwise", "auto", "bf16", "grouped"])
def test_numbers_too_large_for_the_kernels(kernel):
    x, weight, groups = torch.ones(1, 4, 5, 5), torch.ones(4, 4, 3, 3), 1
    if kernel == "depthwise":
        weight, groups = torch.ones(4, 1, 3, 3), 4
    ops, one = torch.ops.fastcv, [1, 1]
    for huge in (2**31, 2**62, 2**63 - 1):
        for numbers in (([huge, 1], one, one), (one, [1, huge], one), (one, one, [huge, huge])):
            geometry = (groups, *numbers)
            with pytest.raises(RuntimeError, match=r"2\^31"):
                ops.conv2d(x, weight, None, None, None, *geometry, "none", 0.0, kernel)
            with pytest.raises(RuntimeError, match=r"2\^31"):
                ops.conv2d_prepare(weight, *geometry, kernel)
        with pytest.raises(RuntimeError, match="groups"):
            ops.conv2d_prepare(weight, huge, one, one, one, kernel)
    with pytest.raises(RuntimeError, match=r"2\^31"):  # the reach of the kernel
        ops.conv2d(x, weight, None, None, None, groups, one, [2**30, 2**30], [2**30, 2**30], "none", 0.0, kernel)
