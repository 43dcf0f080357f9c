"""conv2d: by hand, against float64 over awkward shapes and layouts, kernels by name, derivatives, machinery, errors."""

import gc
import warnings

import conv_cases
import pytest
import torch
import torch.nn.functional as F
from conv_cases import FORMATS, compiled_only, cpu_only, error, with_kernels
from torch.library import opcheck

import fastcv
from fastcv.ops import conv2d
from fastcv.ops._convolution import ACTIVATIONS
from fastcv.ops._layouts import kept
from fastcv.ops.conv2d import KERNELS
from fastcv.reference.conv2d import ACTIVATIONS as FORMULAS

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
    (1, 704, 5, 35, 33, (3, 3), 1, 1, 1, 1),
    (1, 16, 40, 20, 24, (3, 3), (2, 1), (9, 1), (9, 1), 1),
    (1, 16, 60, 11, 24, (3, 3), 1, 20, 20, 1),
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
    (2, 48, 9, 13, 48, (3, 3), 1, 1, 1, 3),
    (1, 32, 10, 30, 32, (3, 3), (1, 2), (0, 2), 1, 2),
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


def test_by_hand():
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    weight = torch.tensor([[[[1.0, 0], [0, -1]]]])
    assert conv2d(x, weight).flatten().tolist() == [-4, -4, -4, -4]
    out = conv2d(x, weight, torch.tensor([2.0]), residual=x[..., :2, :2], activation="relu")
    assert out.flatten().tolist() == [0, 0, 1, 2]
    assert conv2d(x, weight, stride=2, padding=1).flatten().tolist() == [0, -2, -6, -4]


@pytest.mark.parametrize(("shape", "kernel"), with_kernels(conv2d, case, SHAPES, KERNELS), ids=str)
def test_reference(shape, kernel):
    tolerance = 5e-5 if kernel in ("winograd_6x6", "winograd_5x5_4x4") else 1e-5
    conv_cases.check_kernel(conv2d, F.conv2d, case(shape), kernel, tolerance)


@cpu_only
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
    actual = conv2d(x, weight, bias, *geometry, activation=activation, negative_slope=0.2)
    assert error(actual, FORMULAS[activation](before, 0.2)) < 1e-5
    x[0, :, 2, 3] = float("nan")
    actual = conv2d(x, weight, bias, *geometry, activation=activation)
    assert actual[0, :, 2, 3].isnan().all() and actual.isnan().sum() == outputs


def test_scale_and_shift():
    x, weight, bias, *geometry = case(SHAPES[5])
    generator = torch.Generator().manual_seed(1)
    scale, shift = torch.rand(40, generator=generator) + 0.5, torch.randn(40, generator=generator)
    expected = F.conv2d(x, weight, bias, *geometry) * scale[:, None, None] + shift[:, None, None]
    actual = conv2d(x, weight, bias, *geometry, scale=scale, shift=shift)
    assert error(actual, expected.double()) < 1e-5


@pytest.mark.parametrize("shape", SHAPES[2:9])
def test_slices_of_wider_maps(shape):
    conv_cases.check_slices_of_wider_maps(conv2d, F.conv2d, case(shape))


def test_empty_batch():
    assert conv2d(torch.ones(0, 3, 8, 8), torch.ones(5, 3, 3, 3)).shape == (0, 5, 6, 6)


@pytest.mark.parametrize("magnitude", [1e-6, 1e6])
def test_bad_scaling(magnitude):
    conv_cases.check_bad_scaling(conv2d, F.conv2d, case(SHAPES[6]), magnitude)


@pytest.mark.parametrize("shape", SHAPES[:4] + SHAPES[6:7] + SHAPES[15:20])
def test_same_for_any_number_of_threads(shape):
    conv_cases.check_same_for_any_number_of_threads(conv2d, case(shape))


@pytest.mark.parametrize("outputs", [64, 72])
def test_outputs_larger_than_the_caches(outputs):
    """They are written past them: the same bits as in pieces that fit."""
    images = torch.randn(2, 8, 200, 330).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, 8, 1, 1), torch.randn(outputs)
    whole = conv2d(images, weight, bias, activation="relu")
    assert whole.nbytes >= 1 << 25
    pieces = [conv2d(image[None], weight, bias, activation="relu") for image in images]
    assert torch.equal(whole, torch.cat(pieces))


def test_changed_weights_are_noticed():
    conv_cases.check_changed_weights_are_noticed(conv2d, case(SHAPES[6]))


@compiled_only
def test_weights_are_prepared_once_and_forgotten_with_their_tensor():
    gc.collect()
    x, weight, bias, *geometry = case(SHAPES[6])
    conv2d(x, weight, bias, *geometry)
    (first,) = kept[id(weight)].layouts.values()
    conv2d(x, weight, bias, *geometry)
    assert [p is first for p in kept[id(weight)].layouts.values()] == [True]
    count = len(kept)
    del weight
    gc.collect()
    assert len(kept) == count - 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_follow_the_formulas(activation):
    conv_cases.check_derivatives(conv2d, F.conv2d, case((2, 6, 5, 6, 4, (3, 3), 1, 1, 1, 2)), activation)


def test_other_types_run_on_torch():
    conv_cases.check_other_types_run_on_torch(conv2d, F.conv2d, case(SHAPES[6]))


@compiled_only
@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck_and_compile(memory_format):
    x, weight, bias, *_ = case((2, 6, 5, 6, 4, (3, 3), 1, 1, 1, 2))
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    weight.requires_grad_()
    arguments = (x, weight, bias, None, None, 2, [1, 1], [1, 1], [1, 1], "silu", 0.0, "auto")
    opcheck(torch.ops.fastcv.conv2d, arguments)

    def f(x):
        return conv2d(x, weight, bias, padding=1, groups=2, activation="silu")

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), f(x))


def test_same_padding():
    x, weight, bias, *_ = case(SHAPES[6])
    assert torch.equal(conv2d(x, weight, bias, padding="same"), conv2d(x, weight, bias, padding=1))
    with pytest.raises(ValueError, match="same"):
        conv2d(x, weight, bias, stride=2, padding="same")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("size", "dilation"), [((2, 2), 1), ((4, 3), 1), ((3, 4), (2, 3)), ((1, 6), 1)])
def test_same_padding_of_kernels_of_even_size(size, dilation, memory_format):
    x = torch.randn(2, 4, 9, 8).contiguous(memory_format=memory_format).requires_grad_()
    weight, bias, scale = torch.randn(6, 4, *size, requires_grad=True), torch.randn(6), torch.rand(6)
    residual = torch.randn(2, 6, 9, 8)
    for _ in range(2):  # what the first call found is kept
        out = conv2d(x, weight, bias, padding="same", dilation=dilation)
        expected = F.conv2d(x, weight, bias, padding="same", dilation=dilation)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert out.is_contiguous(memory_format=memory_format)
    v = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad((y * v).sum(), [x, weight]) for y in (out, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    options = dict(padding="same", dilation=dilation, scale=scale, residual=residual, activation="relu")
    out = conv2d(x.detach(), weight.detach(), bias, **options)
    torch.testing.assert_close(out, (expected * scale[:, None, None] + residual).relu(), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(fastcv.ops.conv2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, weight, bias, padding="same", dilation=dilation), expected, rtol=1e-4, atol=1e-4
    )


def test_vmap():
    x, weight, residual = torch.randn(3, 2, 4, 6, 7), torch.randn(5, 4, 3, 3), torch.randn(3, 2, 5, 4, 5)
    weights = torch.randn(3, 5, 4, 3, 3)

    def f(x, weight, residual=None):
        return conv2d(x, weight, residual=residual, activation="silu")

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
        (dict(activation="softsign"), "activation: expected .* got 'softsign'"),
        (dict(kernel="fft"), "kernel: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            conv2d(**(dict(input=x, weight=weight, bias=bias) | wrong))
    with pytest.raises(TypeError, match="weight"):
        conv2d(x, weight.int())
    with pytest.raises(RuntimeError, match=r"smaller than the kernel|greater than actual input size"):
        conv2d(x[..., :2], weight)
    with pytest.raises(RuntimeError, match=r"residual|size"):
        conv2d(x, weight, residual=torch.ones(1, 6, 4, 4))
    conv2d(x, weight, stride=1, padding=(1, 1), groups=1)
    for wrong in (dict(stride=1.0), dict(stride=True), dict(padding=(True, 1)), dict(padding=(1.0, 1)),
                  dict(groups=1.0), dict(groups=True)):  # fmt: skip
        with pytest.raises(ValueError, match="expected an int"):
            conv2d(x, weight, **(dict(stride=1, padding=(1, 1), groups=1) | wrong))


def test_numbers_too_large():
    """They would overflow, or be looped over for ever."""
    x, weight, huge = torch.ones(1, 4, 5, 5), torch.ones(4, 4, 3, 3), 2**31
    for name in ("stride", "padding", "dilation"):
        for value in (huge, 2**62, 2**63 - 1, (1, huge)):
            with pytest.raises(ValueError, match=rf"{name}: expected .* at most 2147483647"):
                conv2d(x, weight, **{name: value})


@compiled_only
@pytest.mark.parametrize("kernel", ["gemm", "winograd", "depthwise", "auto", "bf16", "amx", "grouped"])
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
