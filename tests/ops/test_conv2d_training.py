"""conv2d in training: which kernel, gradients, the operator of the input's gradient, losses that follow torch's."""

import functools

import pytest
import torch
import torch.nn.functional as F
from conv_cases import FORMATS, compiled_only, cpu_only, error
from nms_cases import assert_all_equal, with_threads
from torch.library import opcheck

import fastcv
from fastcv._library import implementation
from fastcv.ops import conv2d
from fastcv.ops._conv2d_training import _kernel, input_gradient_kernel

pytestmark = cpu_only

# images, channels, outputs, height, width, padding; large enough that training runs on fastcv's kernels
TRAINED = [(8, 64, 64, 34, 31, 1), (8, 80, 64, 33, 36, 0), (6, 70, 82, 31, 32, 2), (12, 128, 112, 14, 14, (2, 1))]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def trained_case(shape, memory_format=torch.contiguous_format):
    n, c, k, h, w, padding = shape
    x = torch.randn(n, c, h, w).contiguous(memory_format=memory_format).requires_grad_()
    weight = (torch.randn(k, c, 3, 3) / (9 * c) ** 0.5).contiguous(memory_format=memory_format).requires_grad_()
    return x, weight, torch.randn(k, requires_grad=True), padding


def gradients(conv, x, weight, bias, padding, **options):
    out = conv(x, weight, bias, 1, padding, **options)
    v = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return torch.autograd.grad((out * v).sum(), [x, weight, bias])


@functools.cache
def in_double(shape):
    """The output and the gradients, which take longer than all else."""
    torch.manual_seed(0)
    *tensors, padding = trained_case(shape)
    double = [t.detach().double().requires_grad_() for t in tensors]
    return F.conv2d(*double, 1, padding).detach(), gradients(F.conv2d, *double, padding)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", TRAINED, ids=str)
def test_gradients_in_training(shape, memory_format):
    expected, expected_gradients = in_double(shape)
    torch.manual_seed(0)
    x, weight, bias, padding = trained_case(shape, memory_format)
    out = conv2d(x, weight, bias, padding=padding)
    if implementation("conv2d", "cpu") == "compiled":
        p = [padding] * 2 if isinstance(padding, int) else list(padding)
        assert "Convolution" not in type(out.grad_fn).__name__ and out.is_contiguous(memory_format=memory_format)
        assert input_gradient_kernel(out, weight, (1, [1, 1], p, [1, 1])) in ("winograd", "winograd_2x2")
    actual = gradients(conv2d, x, weight, bias, padding)
    assert error(out, expected) < 1e-5
    for a, b in zip(actual, expected_gradients, strict=True):
        assert error(a, b) < 1e-5
    again = gradients(conv2d, x, weight, bias, padding)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


# The last two are those for which more or fewer threads would make another kernel faster.
@compiled_only
@pytest.mark.parametrize("shape", [*TRAINED, (1, 64, 64, 40, 40, 1), (2, 64, 64, 40, 40, 1)], ids=str)
def test_training_is_the_same_for_any_number_of_threads(shape):
    x, weight, bias, padding = trained_case(shape, torch.channels_last)
    threads, kernels, results = torch.get_num_threads(), [], []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        out = conv2d(x, weight, bias, padding=padding)
        kernel = input_gradient_kernel(out, weight, (1, [1, 1], [1, 1], [1, 1]))
        kernels.append((type(out.grad_fn).__name__, kernel))
        results.append((out, *gradients(conv2d, x, weight, bias, padding)[:1]))
    torch.set_num_threads(threads)
    assert kernels[0] == kernels[1] == kernels[2]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_epilogue_in_training():
    x, weight, bias, _ = trained_case(TRAINED[0])
    residual = torch.randn(8, 64, 34, 31, requires_grad=True)
    out = conv2d(x, weight, bias, padding=1, residual=residual, activation="silu")
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
    actual = derivatives(lambda *a: conv2d(*a, padding=padding), x, weight, bias)
    expected = derivatives(lambda *a: F.conv2d(*a, padding=padding), *double)
    for mine, theirs in zip(actual, expected, strict=True):
        assert error(mine, theirs) < 5e-5
    tangents = [torch.randn_like(t) for t in (x, weight, bias)]
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, u) for t, u in zip((x, weight, bias), tangents, strict=True)]
        out = conv2d(*duals, padding=padding)
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

    def prepare():
        for memory_format in FORMATS:
            laid_out = weight.contiguous(memory_format=memory_format)
            yield torch.ops.fastcv.conv2d_prepare(laid_out, *geometry, "winograd")

    assert_all_equal([[layout] for layouts in with_threads(prepare) for layout in layouts])


def test_where_training_runs():
    """Preparing weights of many channels for few pixels, or anything for a tiny layer, does not pay."""

    def kernel(*shape):
        return _kernel(*shape, True, False)

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
