"""conv_transpose2d: by hand, against float64 over awkward shapes and layouts, kernels by name, derivatives, machinery,
errors."""

import gc
import warnings

import conv_cases
import pytest
import torch
import torch.nn.functional as F
from conv_cases import FORMATS, compiled_only, cpu_only, error, or_triton, with_kernels
from torch.library import opcheck

import fastcv
from fastcv.ops import conv2d, conv_transpose2d
from fastcv.ops._convolution import ACTIVATIONS
from fastcv.ops._layouts import kept
from fastcv.ops.conv_transpose2d import KERNELS
from fastcv.reference.conv2d import ACTIVATIONS as FORMULAS

# images, channels, height, width, outputs, kernel, stride, padding, output padding, groups, dilation
SHAPES = [
    (1, 40, 7, 9, 33, (2, 2), 2, 0, 0, 1, 1),
    (3, 17, 6, 5, 70, (2, 2), 2, 0, 1, 1, 1),
    (1, 40, 11, 12, 64, (4, 4), 2, 1, 0, 1, 1),
    (2, 33, 5, 6, 40, (4, 4), 2, 0, 0, 1, 1),
    (2, 16, 9, 8, 3, (4, 4), 2, 1, 0, 1, 1),
    (1, 24, 8, 7, 20, (3, 3), 2, 1, 1, 1, 1),
    (1, 36, 9, 30, 35, (3, 3), 2, 1, 0, 1, 1),
    (1, 34, 13, 10, 36, (3, 3), 1, 1, 0, 1, 1),
    (1, 32, 12, 11, 48, (5, 5), 2, 2, 1, 1, 1),
    (1, 8, 9, 9, 16, (5, 5), 1, 2, 0, 1, 1),
    (1, 21, 5, 6, 21, (16, 16), 8, 4, 0, 1, 1),
    (1, 5, 3, 4, 5, (16, 16), 8, 0, 3, 1, 1),
    (1, 3, 3, 2, 2, (64, 64), 32, 16, 0, 1, 1),
    (2, 21, 7, 6, 21, (4, 4), 2, 1, 0, 21, 1),
    (1, 32, 6, 9, 32, (4, 4), 2, 1, 0, 32, 1),
    (1, 5, 4, 3, 5, (16, 16), 8, 4, 0, 5, 1),
    (1, 24, 5, 6, 24, (3, 3), 1, 1, 0, 24, 1),
    (2, 16, 7, 5, 24, (4, 4), 2, 1, 0, 2, 1),
    (1, 32, 9, 8, 32, (3, 3), 1, 1, 0, 8, 1),
    (1, 32, 6, 5, 64, (3, 3), 2, 1, 1, 4, 1),
    (3, 20, 1, 1, 24, (4, 4), 1, 0, 0, 1, 1),
    (2, 20, 1, 1, 7, (4, 3), (2, 3), (1, 0), 1, 1, (1, 2)),
    (1, 9, 1, 6, 10, (3, 4), (3, 2), 1, (2, 1), 1, 1),
    (1, 12, 6, 7, 20, (3, 3), 2, 2, 1, 1, 2),
    (1, 12, 6, 7, 20, (3, 3), 2, 3, 1, 1, 3),
    (1, 12, 5, 7, 33, (3, 2), (4, 6), (1, 2), (3, 5), 1, (2, 4)),
    (1, 33, 8, 9, 40, (3, 3), 1, 2, 0, 1, 2),
    (1, 33, 8, 9, 40, (3, 3), 1, 4, 3, 1, 4),
    (1, 8, 5, 4, 6, (1, 1), 3, 0, 2, 1, 1),
    (1, 8, 5, 4, 6, (2, 2), 3, 1, 0, 1, 1),
    (1, 4, 4, 4, 5, (3, 3), 2, 4, 1, 1, 1),
    (1, 2, 2, 2, 3, (1, 1), 1, 0, 0, 1, 1),
    (9, 20, 1, 1, 24, (4, 4), 1, 0, 0, 1, 1),
    (7, 41, 1, 1, 90, (5, 7), 2, (1, 2), 1, 1, 1),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def case(shape, dtype=torch.float32):
    n, c, h, w, k, kernel, stride, padding, output_padding, groups, dilation = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, h, w, generator=generator, dtype=dtype)
    weight = torch.randn(c, k // groups, *kernel, generator=generator, dtype=dtype)
    bias = torch.randn(k, generator=generator, dtype=dtype)
    return x, weight, bias, stride, padding, output_padding, groups, dilation


def test_lecture_example():
    """The worked example of the lecture notes: each input pixel adds the kernel, scaled, to where it stands."""
    x = torch.tensor([[[[2.0, 1], [4, 4]]]])
    weight = torch.tensor([[[[1.0, 4, 1], [1, 4, 3], [3, 3, 1]]]])
    expected = [2, 9, 6, 1, 6, 29, 30, 7, 10, 29, 33, 13, 12, 24, 16, 4]
    assert conv_transpose2d(x, weight).flatten().tolist() == expected


def test_by_hand():
    x = torch.tensor([[[[1.0, 2], [3, 4]]]])
    weight = torch.tensor([[[[1.0, 10], [100, 1000]]]])
    out = conv_transpose2d(x, weight, stride=2)
    assert out[0, 0].tolist() == [[1, 10, 2, 20], [100, 1000, 200, 2000], [3, 30, 4, 40], [300, 3000, 400, 4000]]
    out = conv_transpose2d(x, weight, torch.tensor([-5.0]), stride=2, padding=1, activation="relu")
    assert out[0, 0].tolist() == [[995, 195], [25, 0]]
    # Two pixels meet in the middle; the pixel that output padding adds holds the bias alone.
    line, three = torch.tensor([[[[1.0, 2]]]]), torch.tensor([[[[1.0, 2, 3]]]])
    out = conv_transpose2d(line, three, torch.tensor([0.5]), stride=(1, 2), output_padding=(0, 1))
    assert out.flatten().tolist() == [1.5, 2.5, 5.5, 4.5, 6.5, 0.5]
    out = conv_transpose2d(line, three, stride=(1, 2), residual=torch.ones(1, 1, 1, 5), activation="relu")
    assert out.flatten().tolist() == [2, 3, 6, 5, 7]


@pytest.mark.parametrize(("shape", "kernel"), with_kernels(conv_transpose2d, case, SHAPES, KERNELS), ids=str)
def test_reference(shape, kernel):
    conv_cases.check_kernel(conv_transpose2d, F.conv_transpose2d, case(shape), kernel, 1e-5)


@cpu_only
@compiled_only
def test_each_kernel_is_chosen_somewhere():
    chosen = set()
    for shape in SHAPES:
        x, weight, _, stride, padding, output_padding, groups, dilation = case(shape)
        two = [[v, v] if isinstance(v, int) else list(v) for v in (stride, padding, output_padding, dilation)]
        chosen.add(KERNELS[torch.ops.fastcv.conv_transpose2d_kernel(x, weight, groups, *two)])
    assert chosen >= {"gemm", "winograd", "winograd_3x3", "depthwise", "grouped", "merged", "pixel", "pixel_gemv"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[4], SHAPES[13]], ids=str)
def test_activations(activation, shape):
    x, weight, bias, *geometry = case(shape)
    before = F.conv_transpose2d(x.double(), weight.double(), bias.double(), *geometry)
    actual = conv_transpose2d(x, weight, bias, *geometry, activation=activation, negative_slope=0.2)
    assert error(actual, FORMULAS[activation](before, 0.2)) < 1e-5


@pytest.mark.parametrize("kernel", ["gemm", "merged", "depthwise"])
def test_nan_stays_where_it_reaches(kernel):
    x, weight, bias, *geometry = case(SHAPES[14] if kernel == "depthwise" else SHAPES[4])
    x[0, :, 2, 3] = float("nan")
    expected = F.conv_transpose2d(x, weight, bias, *geometry).isnan()
    for activation in ("none", "relu"):
        actual = conv_transpose2d(x, weight, bias, *geometry, activation=activation, kernel=or_triton(kernel))
        assert torch.equal(actual.isnan(), expected)


@pytest.mark.parametrize("shape", [*SHAPES[:6], SHAPES[10], *SHAPES[13:15], SHAPES[17], *SHAPES[20:22]], ids=str)
def test_slices_of_wider_maps(shape):
    conv_cases.check_slices_of_wider_maps(conv_transpose2d, F.conv_transpose2d, case(shape))


def test_empty_batch():
    for shape in (SHAPES[2], SHAPES[4], SHAPES[13], SHAPES[20]):
        x, weight, bias, *geometry = case(shape)
        expected = F.conv_transpose2d(x[:0], weight, bias, *geometry)
        assert conv_transpose2d(x[:0], weight, bias, *geometry).shape == expected.shape


@pytest.mark.parametrize("magnitude", [1e-6, 1e6])
def test_bad_scaling(magnitude):
    conv_cases.check_bad_scaling(conv_transpose2d, F.conv_transpose2d, case(SHAPES[2]), magnitude)


@pytest.mark.parametrize("shape", [SHAPES[i] for i in (0, 2, 4, 6, 8, 10, 13, 17, 20, 23)], ids=str)
def test_same_for_any_number_of_threads(shape):
    conv_cases.check_same_for_any_number_of_threads(conv_transpose2d, case(shape))


def test_changed_weights_are_noticed():
    conv_cases.check_changed_weights_are_noticed(conv_transpose2d, case(SHAPES[2]))


@cpu_only
@compiled_only
def test_weights_are_prepared_once_and_apart_from_those_of_conv2d():
    gc.collect()
    x, weight, bias = torch.randn(1, 64, 9, 9), torch.randn(64, 64, 3, 3), torch.randn(64)
    conv2d(x, weight, bias, padding=1)
    expected = F.conv_transpose2d(x, weight, bias, padding=1)
    for _ in range(2):
        assert error(fastcv.ops.conv_transpose2d(x, weight, bias, padding=1), expected.double()) < 1e-5
    assert len(kept[id(weight)].layouts) == 2
    # Other paddings lay the weights out alike.
    for padding in (0, 1):
        for output_padding in ((0, 0), (0, 1), (1, 1)):
            options = dict(stride=2, padding=padding, output_padding=output_padding)
            result = fastcv.ops.conv_transpose2d(x, weight, bias, **options, kernel="winograd")
            expected = F.conv_transpose2d(x, weight, bias, **options)
            assert error(result, expected.double()) < 1e-5
    assert len(kept[id(weight)].layouts) == 3
    # Other geometries lay the same weights out in other ways, dilated ones also by their padding.
    for stride, padding, output_padding, dilation in (
        (2, 1, 1, 1),
        (2, 0, 0, 1),
        (1, 2, 0, 2),
        (1, 1, 0, 2),
        (2, 1, 0, 2),
        (3, 1, 2, 1),
    ):
        options = dict(stride=stride, padding=padding, output_padding=output_padding, dilation=dilation)
        for y, kernel in ((x, "auto"), (x[:, :, :1, :1], "auto"), (x, "winograd")):
            if (y.shape[2] - 1) * stride - 2 * padding + 2 * dilation + output_padding < 0:
                continue
            expected = F.conv_transpose2d(y, weight, bias, **options)
            result = fastcv.ops.conv_transpose2d(y, weight, bias, **options, kernel=kernel)
            assert error(result, expected.double()) < 1e-5


@pytest.mark.parametrize("activation", ["none", "silu", "leaky_relu"])
@pytest.mark.parametrize("trains", [False, True])
def test_derivatives_follow_the_formulas(activation, trains):
    arguments = case((2, 6, 4, 5, 4, (3, 4), 2, 1, 1, 2, 1))
    conv_cases.check_derivatives(conv_transpose2d, F.conv_transpose2d, arguments, activation, trains=trains)


@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 2, 2, (3, 2), 2, 1, (1, 0), 1, 1), (1, 2, 1, 2, 2, (2, 2), 1, 0, 2, 2, 3)], ids=str
)
def test_gradcheck(shape):
    x, weight, bias, *geometry = case(shape, torch.float64)
    arguments = [t.requires_grad_() for t in (x, weight, bias)]

    def f(*tensors):
        return conv_transpose2d(*tensors, *geometry, activation="silu")

    assert torch.autograd.gradcheck(f, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, arguments)


def test_input_gradient_with_output_padding_of_a_stride():
    """The convolution that the gradient is would have more pixels than the input."""
    x, weight = torch.randn(1, 3, 4, 4, requires_grad=True), torch.randn(3, 2, 3, 3)
    options = dict(output_padding=2, dilation=3)
    v = torch.randn_like(F.conv_transpose2d(x, weight, **options))
    (actual,) = torch.autograd.grad((conv_transpose2d(x, weight, **options) * v).sum(), x)
    (expected,) = torch.autograd.grad((F.conv_transpose2d(x, weight, **options) * v).sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_other_types_run_on_torch():
    conv_cases.check_other_types_run_on_torch(conv_transpose2d, F.conv_transpose2d, case(SHAPES[5]))


@compiled_only
@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck_and_compile(memory_format):
    x, weight, bias, *_ = case((2, 6, 5, 6, 4, (3, 3), 2, 1, 1, 2, 1))
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    weight.requires_grad_()
    arguments = (x, weight, bias, None, None, 2, [2, 2], [1, 1], [1, 0], [1, 1], "silu", 0.0, "auto")
    opcheck(torch.ops.fastcv.conv_transpose2d, arguments)

    def f(x, weight):
        return conv_transpose2d(x, weight, bias, 2, 1, (1, 0), 2, activation="silu")

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for w in (weight, weight.detach()):
        torch.testing.assert_close(compiled(x, w), f(x, w))
        (actual,) = torch.autograd.grad(compiled(x, w).square().sum(), x)
        (expected,) = torch.autograd.grad(f(x, w).square().sum(), x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_errors():
    x, weight, bias = torch.ones(1, 4, 5, 5), torch.ones(4, 6, 3, 3), torch.ones(6)
    for wrong, message in (
        (dict(input=x[0]), r"input: expected shape \[N, C, H, W\], got \[4, 5, 5\]"),
        (dict(weight=weight[:3]), r"weight: expected shape \[4, K / groups, KH, KW\], got \[3, 6, 3, 3\]"),
        (dict(bias=bias[:5]), r"bias: expected shape \[6\]"),
        (dict(groups=3), "groups: expected a divisor of 4 channels, got 3"),
        (dict(stride=0), "stride"),
        (dict(padding=-1), "padding"),
        (dict(stride=2, output_padding=2), "output_padding: expected less than stride or dilation, 2, got 2"),
        (dict(padding=4), "input: expected a size that gives an output"),
        (dict(activation="softsign"), "activation: expected .* got 'softsign'"),
        (dict(kernel="fft"), "kernel: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            conv_transpose2d(**(dict(input=x, weight=weight, bias=bias) | wrong))
    with pytest.raises(TypeError, match="weight"):
        conv_transpose2d(x, weight.int())
    with pytest.raises(RuntimeError, match=r"residual|size"):
        conv_transpose2d(x, weight, residual=torch.ones(1, 6, 4, 4))


@compiled_only
@pytest.mark.parametrize("kernel", ["gemm", "merged", "depthwise", "pixel", "pixel_gemv", "winograd", "auto"])
def test_numbers_too_large(kernel):
    x, weight, groups = torch.ones(1, 4, 1, 1), torch.ones(4, 4, 2, 2), 1
    if kernel == "depthwise":
        weight, groups = torch.ones(4, 1, 2, 2), 4
    one, none = [1, 1], [0, 0]
    for huge in (2**31, 2**40, 2**62, 2**63 - 1):
        for geometry in (
            (groups, [huge, huge], none, none, one),
            (groups, one, [huge, huge], none, one),
            (groups, one, none, none, [huge, huge]),
            (groups, one, [2**62, 2**62], [huge, huge], one),
            (groups, one, none, [huge, huge], one),
        ):
            with pytest.raises(RuntimeError, match=r"2\^31"):
                torch.ops.fastcv.conv_transpose2d(x, weight, None, None, None, *geometry, "none", 0.0, kernel)
    for stride in ((2**20, 1), (300, 300)):
        with pytest.raises(RuntimeError, match="at most 65536 phases"):
            fastcv.ops.conv_transpose2d(x, weight, stride=stride, groups=groups, kernel=kernel)
    with pytest.raises(ValueError, match=r"dilation: expected .* at most 2147483647"):
        fastcv.ops.conv_transpose2d(x, weight, groups=groups, dilation=2**31)
    out = fastcv.ops.conv_transpose2d(x, weight, groups=groups, dilation=100, kernel=kernel)
    torch.testing.assert_close(out, F.conv_transpose2d(x, weight, groups=groups, dilation=100))


def test_vmap():
    x, weight, weights = torch.randn(3, 2, 4, 6, 7), torch.randn(4, 5, 3, 3), torch.randn(3, 4, 5, 3, 3)

    def f(x, weight):
        return fastcv.ops.conv_transpose2d(x, weight, stride=2)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of torch's slow way
        for actual, expected in (
            (torch.func.vmap(f, (0, None))(x, weight), [f(s, weight) for s in x]),
            (torch.func.vmap(f)(x, weights), [f(s, w) for s, w in zip(x, weights, strict=True)]),
        ):
            torch.testing.assert_close(actual, torch.stack(expected))


@compiled_only
def test_errors_of_kernels_that_do_not_serve():
    x, weight = torch.ones(1, 4, 5, 5), torch.ones(4, 6, 3, 3)
    for kernel in ("depthwise", "pixel", "pixel_gemv"):
        with pytest.raises(RuntimeError, match="does not serve"):
            conv_transpose2d(x, weight, kernel=kernel)
