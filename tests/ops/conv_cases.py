"""What the tests of the convolutions share: ``ours`` is fastcv's, ``theirs`` torch's, ``case`` their arguments."""

import os

import pytest
import torch
import torch.nn.functional as F
from nms_cases import assert_all_equal, with_threads

from fastcv._library import implementation
from fastcv.reference.conv2d import ACTIVATIONS as FORMULAS

FORMATS = (torch.contiguous_format, torch.channels_last)
compiled_only = pytest.mark.skipif(
    implementation("conv2d", "cpu") != "compiled",
    reason="of the compiled kernels; the reference is torch's",
)

# Triton's kernels, which have no names, may stand in the place of the CPU's: see tests/backends.
ON_TRITON = torch.ops.fastcv.conv2d_kernel(*[torch.ones(1, 1, 1, 1)] * 2, 1, [1, 1], [0, 0], [1, 1]) < 0
cpu_only = pytest.mark.skipif(ON_TRITON, reason="of the CPU's kernels by name, or of training on them")


def or_triton(kernel):
    """A kernel of the CPU's that a test is about, or what Triton's have in the place of names."""
    return "auto" if ON_TRITON else kernel


def error(actual, expected):
    """The largest, relative to the largest number."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def takes_long(n, c, h, w, k, kernel, stride, padding, extra, groups, *_):
    """In Triton's interpreter, by the number of steps, or of the phases of a transposed convolution."""
    many = c * h * w > 40_000 or (stride in (8, 32) and groups == 1)
    return many and os.environ.get("TRITON_INTERPRET") == "1"


def with_kernels(ours, case, shapes, kernels):
    """Pairs of a shape and a kernel that serves it; torch's, which serves them all, with the first three alone."""

    def serves(shape, kernel):
        x, weight, _, *geometry = case(shape)
        try:
            ours(x, weight, None, *geometry, kernel=kernel)
        except RuntimeError as failure:
            assert "does not serve" in str(failure)
            return False
        return True

    if ON_TRITON:
        return [(shape, "auto") for shape in shapes if not takes_long(*shape)]
    named = [k for k in kernels if k != "torch"]
    pairs = [(shape, kernel) for shape in shapes for kernel in ("auto", *named) if serves(shape, kernel)]
    return pairs + [(shape, "torch") for shape in shapes[:3]]


def in_double(theirs, case):
    x, weight, bias, *geometry = case
    return theirs(x.double(), weight.double(), bias.double(), *geometry)


def check_kernel(ours, theirs, case, kernel, tolerance):
    """In both memory formats, with and without an epilogue."""
    x, weight, bias, *geometry = case
    if kernel in ("bf16", "amx"):  # exact, but for the rounding of its operands
        x, weight = x.bfloat16().float(), weight.bfloat16().float()
    expected = in_double(theirs, (x, weight, bias, *geometry))
    residual = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    with_epilogue = F.silu(expected - bias.double()[:, None, None] + residual)
    for memory_format in FORMATS:
        y = x.contiguous(memory_format=memory_format)
        actual = ours(y, weight, bias, *geometry, kernel=kernel)
        assert actual.dtype == torch.float32
        assert actual.is_contiguous(memory_format=torch._prims_common.suggest_memory_format(y))
        assert error(actual, expected) < tolerance
        actual = ours(y, weight, None, *geometry, residual=residual, activation="silu", kernel=kernel)
        assert error(actual, with_epilogue) < tolerance


def check_slices_of_wider_maps(ours, theirs, case):
    """Input and residual whose pixels are further apart than their channels."""
    x, weight, bias, *geometry = case
    size = x.shape[0], x.shape[1] + 5, x.shape[2], x.shape[3] + 3
    wide = torch.randn(size).contiguous(memory_format=torch.channels_last)
    wide[:, 2 : 2 + x.shape[1], :, 1 : 1 + x.shape[3]] = x
    sliced = wide[:, 2 : 2 + x.shape[1], :, 1 : 1 + x.shape[3]]
    expected = in_double(theirs, case)
    residual = torch.randn(expected.shape[0], 2 * expected.shape[1], *expected.shape[2:])
    residual = residual.contiguous(memory_format=torch.channels_last)[:, 1 : 1 + expected.shape[1]]
    actual = ours(sliced, weight, bias, *geometry, residual=residual)
    assert error(actual, expected + residual) < 1e-5


def check_bad_scaling(ours, theirs, case, magnitude):
    x, weight, bias, *geometry = case
    for a, b in ((magnitude, 1.0), (1.0, magnitude), (magnitude, 1 / magnitude)):
        expected = in_double(theirs, (x * a, weight * b, 0 * bias, *geometry))
        assert error(ours(x * a, weight * b, None, *geometry), expected) < 1e-5


def check_same_for_any_number_of_threads(ours, case):
    assert_all_equal(with_threads(lambda: [ours(*case)]))


def check_changed_weights_are_noticed(ours, case):
    x, weight, _, *geometry = case

    def conv(w):
        return ours(x, w, None, *geometry)

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


def check_derivatives(ours, theirs, case, activation, *, trains=True):
    """First, second and forward ones, with a residual; of the input and the residual alone if not ``trains``."""
    x, weight, bias, *geometry = case
    residual = torch.randn(theirs(x, weight, bias, *geometry).shape)
    arguments = [x, weight, bias, residual] if trains else [x, residual]
    for t in arguments:
        t.requires_grad_()
    out = ours(x, weight, bias, *geometry, residual=residual, activation=activation)
    expected = FORMULAS[activation](theirs(x, weight, bias, *geometry) + residual, 0.01)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    v, u = torch.randn_like(out), [torch.randn_like(t) for t in arguments]

    def dot(ts):
        return sum((a * b).sum() for a, b in zip(ts, u, strict=True))

    def second(first):
        if not first.requires_grad:  # linear in what is asked for
            return [torch.zeros_like(t) for t in arguments]
        return torch.autograd.grad(first, arguments, allow_unused=True, materialize_grads=True)

    first = torch.autograd.grad((out * v).sum(), arguments, create_graph=True)
    first_expected = torch.autograd.grad((expected * v).sum(), arguments, create_graph=True)
    torch.testing.assert_close(first, first_expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(second(dot(first)), second(dot(first_expected)), rtol=1e-3, atol=2e-3)

    def f(*given):
        x_, weight_, bias_, residual_ = given if trains else (given[0], weight, bias, given[1])
        return ours(x_, weight_, bias_, *geometry, residual=residual_, activation=activation)

    _, tangent = torch.func.jvp(f, tuple(t.detach() for t in arguments), tuple(u))
    wanted = dot(first_expected).item()
    assert abs((tangent * v).sum().item() - wanted) < 1e-2 * max(1, abs(wanted))


def check_other_types_run_on_torch(ours, theirs, case):
    for dtype in (torch.float64, torch.bfloat16):
        x, weight, bias, *geometry = (t.to(dtype) if isinstance(t, torch.Tensor) else t for t in case)
        actual = ours(x, weight, bias, *geometry, activation="relu")
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, theirs(x, weight, bias, *geometry).relu())
