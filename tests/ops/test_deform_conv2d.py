"""deform_conv2d: by hand, against float64 over awkward shapes and strides, edges of its definition, types, memory."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from deform_conv2d_cases import (
    FORMATS,
    assert_near,
    gradient_of,
    operator,
    operator_backward,
    random_arguments,
    reference,
)

import fastcv
from fastcv.ops import deform_conv2d

CONFIGURATIONS = [
    {},
    {"masked": False},
    {"batch": 1, "channels": 1, "outputs": 1, "size": (1, 1), "kernel": (1, 1), "padding": (0, 0)},
    {"channels": 3, "outputs": 5, "size": (1, 6), "kernel": (1, 3), "padding": (0, 1)},
    {"channels": 3, "outputs": 5, "size": (6, 1), "kernel": (3, 1), "padding": (1, 0)},
    {"size": (2, 2), "kernel": (2, 2), "padding": (3, 3), "spread": 4.0},
    {"channels": 12, "outputs": 9, "groups": 3, "offset_groups": 2, "kernel": (2, 3)},
    {"channels": 12, "outputs": 4, "groups": 2, "offset_groups": 4, "stride": (2, 3)},
    {"channels": 20, "outputs": 20, "groups": 20, "offset_groups": 5, "dilation": (2, 1)},
    {"channels": 40, "outputs": 33, "groups": 1, "offset_groups": 40, "size": (5, 4)},
    {"channels": 37, "outputs": 17, "kernel": (1, 1), "padding": (0, 0), "size": (13, 11)},
    {"channels": 48, "outputs": 66, "groups": 2, "kernel": (5, 5), "padding": (2, 2), "batch": 3},
    {"channels": 150, "outputs": 3, "batch": 3, "size": (5, 7)},
    {"channels": 2, "outputs": 2, "size": (40, 45), "spread": 30.0},
    {"channels": 2, "outputs": 300, "size": (4, 40), "kernel": (4, 2), "padding": (2, 4), "stride": (1, 2)},
    {"channels": 48, "outputs": 72, "size": (9, 20), "offset_groups": 2},
]


# ---- by hand -------------------------------------------------------------------------------------


def test_by_hand():
    image = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]]).reshape(1, 1, 3, 3)
    kernel = torch.tensor([[1.0, 10.0]]).reshape(1, 1, 1, 2)  # two elements side by side
    # Outputs (y, x), y in 0 to 2, x in 0 to 1. The left element is moved by (0.5, 0), the right one by (0, -0.25).
    offset = torch.tensor([0.5, 0.0, 0.0, -0.25]).reshape(1, 4, 1, 1).expand(1, 4, 3, 2)
    left = torch.tensor([[4.5, 9.0], [36.0, 72.0], [32.0, 64.0]])  # the row below the last one is zero
    right = torch.tensor([[1.75, 3.5], [14.0, 28.0], [112.0, 224.0]])
    result = deform_conv2d(image, offset, kernel)
    assert result.tolist() == [[(left + 10 * right).tolist()]]
    # Modulation, bias.
    mask = torch.tensor([2.0, 0.5]).reshape(1, 2, 1, 1).expand(1, 2, 3, 2)
    result = deform_conv2d(image, offset, kernel, torch.tensor([100.0]), mask=mask)
    assert result.tolist() == [[(2 * left + 5 * right + 100).tolist()]]


def test_derivatives_by_hand():
    image = torch.tensor([[1.0, 2.0], [4.0, 8.0]]).reshape(1, 1, 2, 2).requires_grad_()
    weight = torch.tensor([3.0]).reshape(1, 1, 1, 1).requires_grad_()
    offset = torch.zeros(1, 2, 2, 2)
    offset[0, :, 0, 0] = torch.tensor([0.25, 0.5])
    mask = torch.zeros(1, 1, 2, 2)
    mask[0, 0, 0, 0] = 2.0
    offset.requires_grad_(), mask.requires_grad_()
    deform_conv2d(image, offset, weight, mask=mask)[0, 0, 0, 0].backward()
    value = 0.75 * 1.5 + 0.25 * 6.0
    assert image.grad.flatten().tolist() == [6 * 0.375, 6 * 0.375, 6 * 0.125, 6 * 0.125]
    assert weight.grad.item() == 2 * value
    assert mask.grad[0, 0, 0, 0].item() == 3 * value
    assert offset.grad[0, :, 0, 0].tolist() == [6 * (6.0 - 1.5), 6 * (0.75 * 1.0 + 0.25 * 4.0)]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_without_offsets_it_is_convolution(groups, memory_format):
    (input, weight, offset, _, bias), _ = random_arguments(
        channels=8, outputs=12, groups=groups, stride=(2, 1), padding=(2, 1), dilation=(1, 2), masked=False
    )
    input = input.contiguous(memory_format=memory_format)
    geometry = {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)}
    result = deform_conv2d(input, torch.zeros_like(offset), weight, bias, **geometry)
    expected = torch.nn.functional.conv2d(input, weight, bias, groups=groups, **geometry)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert result.is_contiguous(memory_format=memory_format)


# ---- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("number", range(len(CONFIGURATIONS)))
def test_reference(number, memory_format):
    tensors, constants = random_arguments(seed=number, **CONFIGURATIONS[number])
    expected = reference.deform_conv2d(*tensors, *constants)
    grad = gradient_of(tensors, constants)
    expected_gradients = reference.deform_conv2d_backward(grad, *tensors, *constants)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 3e-6)):
        typed = [t.to(dtype) for t in tensors]
        typed[0] = typed[0].contiguous(memory_format=memory_format)
        result = operator(*typed, *constants)
        assert result.dtype == dtype and result.is_contiguous(memory_format=memory_format)
        assert_near(result, expected, tolerance)
        gradients = operator_backward(grad.to(dtype).contiguous(memory_format=memory_format), *typed, *constants)
        assert gradients[0].is_contiguous(memory_format=memory_format)
        for result, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert result.dtype == dtype
            # A float32 position near a pixel may fall on its other side, where the slope differs.
            assert_near(result, expected_gradient, tolerance * (1 if dtype == torch.float64 else 10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_half_types(dtype, memory_format):
    for number in (0, 1, 6, 8):
        tensors, constants = random_arguments(seed=number, dtype=dtype, **CONFIGURATIONS[number])
        tensors[0].data = tensors[0].contiguous(memory_format=memory_format)
        grad = gradient_of([t.float() for t in tensors], constants).to(dtype)
        exact = [t.double() for t in tensors]
        result = operator(*tensors, *constants)
        assert result.dtype == dtype
        rounding = torch.finfo(dtype).eps
        assert_near(result, reference.deform_conv2d(*exact, *constants), rounding)
        gradients = operator_backward(grad, *tensors, *constants)
        expected = reference.deform_conv2d_backward(grad.double(), *exact, *constants)
        for result, expected_gradient in zip(gradients, expected, strict=True):
            assert result.dtype == dtype
            assert_near(result, expected_gradient, rounding)


def test_strides():
    """Views are read in place: slices, permutations, expanded and flipped tensors."""
    tensors, constants = random_arguments(channels=16, outputs=8, offset_groups=2, groups=2)
    grad = gradient_of(tensors, constants)
    expected = operator(*tensors, *constants)
    expected_gradients = operator_backward(grad, *tensors, *constants)

    def sliced(t):
        wide = torch.full([2 * n for n in t.shape], torch.nan, dtype=t.dtype)
        view = wide[tuple(slice(n // 2, n // 2 + n) for n in t.shape)]
        view.copy_(t)
        return view

    def channels_last(t):
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    def transposed(t):
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() == 4 else t

    def sliced_channels_last(t):
        return sliced(t.movedim(1, -1)).movedim(-1, 1) if t.dim() == 4 else t

    for change in (sliced, channels_last, transposed, sliced_channels_last):
        changed = [change(t) for t in tensors]
        assert_near(operator(*changed, *constants), expected, 1e-14)
        for result, expected_gradient in zip(
            operator_backward(change(grad), *changed, *constants), expected_gradients, strict=True
        ):
            assert_near(result, expected_gradient, 1e-14)
    ones = torch.ones((), dtype=grad.dtype).expand_as(grad)  # as sum().backward() gives it
    for result, expected_gradient in zip(
        operator_backward(ones, *tensors, *constants),
        operator_backward(ones.contiguous(), *tensors, *constants),
        strict=True,
    ):
        torch.testing.assert_close(result, expected_gradient, rtol=0, atol=0)


@pytest.mark.parametrize(("batch", "outputs"), [(0, 6), (2, 0)])
def test_empty(batch, outputs):
    tensors, constants = random_arguments(batch=batch, outputs=outputs)
    tensors = [t.requires_grad_() for t in tensors]
    result = operator(*tensors, *constants)
    assert result.shape == (batch, outputs, 7, 9)
    gradients = torch.autograd.grad(result.sum(), tensors)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


def test_only_the_wanted_gradients():
    tensors, constants = random_arguments()
    grad = gradient_of(tensors, constants)
    everything = operator_backward(grad, *tensors, *constants)
    for needs, memory_format in itertools.product(range(32), FORMATS):
        tensors[0].data = tensors[0].contiguous(memory_format=memory_format)
        gradients = operator_backward(grad, *tensors, *constants, needs)
        for i, (gradient, expected) in enumerate(zip(gradients, everything, strict=True)):
            if needs >> i & 1:
                torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13)
            else:
                assert gradient.shape == (0,)


# ---- the edges of definition ------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("run", [operator, reference.deform_conv2d])
def test_outside_is_not_read(run, memory_format):
    """Infinity beside a sample does not become NaN by a weight of zero."""
    image = torch.full((1, 32, 3, 3), torch.inf).contiguous(memory_format=memory_format)
    image[:, :, 1, 1] = 1.0
    weight = torch.ones(1, 32, 1, 1)
    empty, constants = torch.empty(0), (1, 1, 0, 0, 1, 1, 1, 1, False)
    for y, x in itertools.product((-1.0, -1.5, -7.0, 3.0, 3.5, torch.inf, -torch.inf), repeat=2):
        offset = torch.tensor([y, x]).reshape(1, 2, 1, 1) - torch.arange(3.0).reshape(1, 1, 3, 1) * torch.tensor(
            [1.0, 0.0]
        ).reshape(1, 2, 1, 1)
        offset = (offset - torch.arange(3.0) * torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1)).expand(1, 2, 3, 3)
        assert not run(image, weight, offset, empty, empty, *constants).any(), (y, x)
    row = torch.tensor([0.0, -1.0]).reshape(1, 2, 1, 1).expand(1, 2, 3, 3)
    result = run(image, weight, row, empty, empty, *constants)
    assert not result[..., 0].any()  # a pixel left of the input: nothing, though the next pixel is infinite


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("backward", [operator_backward, reference.deform_conv2d_backward])
def test_nan(backward, memory_format):
    run = operator if backward is operator_backward else reference.deform_conv2d
    tensors, constants = random_arguments(channels=8, outputs=3, dtype=torch.float32)
    tensors[0].data = tensors[0].contiguous(memory_format=memory_format)
    good = run(*tensors, *constants)
    grad = torch.ones_like(good)
    good_gradients = backward(grad, *tensors, *constants)
    for which, channel in ((2, 3), (2, 8), (3, 4)):
        bad = [t.clone(memory_format=torch.preserve_format) for t in tensors]
        bad[which][1, channel, 2, 3] = torch.nan
        result = run(*bad, *constants)
        hit = torch.zeros_like(result, dtype=torch.bool)
        hit[1, :, 2, 3] = True
        assert result[hit].isnan().all()
        torch.testing.assert_close(result[~hit], good[~hit], rtol=0, atol=1e-5)
        grad_input, _, grad_offset, grad_mask, grad_bias = backward(grad, *bad, *constants)
        if which == 2:
            assert grad_input.isfinite().all()
        tap = channel // 2 if which == 2 else channel
        assert grad_offset[1, 2 * tap : 2 * tap + 2, 2, 3].isnan().any()
        assert grad_offset.isnan().sum() <= 2 and grad_mask.isnan().sum() <= 1
        torch.testing.assert_close(grad_bias, good_gradients[4])


def test_slope_to_the_right_on_pixels():
    """Zero offsets, as at the start of training, lie on pixels, and those of padding at -1 exactly."""
    tensors, constants = random_arguments(spread=0.0)
    grad = gradient_of(tensors, constants)
    nudged = list(tensors)
    nudged[2] = tensors[2] + 1e-9
    for memory_format in FORMATS:
        tensors[0].data = tensors[0].contiguous(memory_format=memory_format)
        nudged[0] = tensors[0]
        result = operator_backward(grad, *tensors, *constants)[2]
        assert_near(result, operator_backward(grad, *nudged, *constants)[2], 1e-7)
        assert_near(result, reference.deform_conv2d_backward(grad, *tensors, *constants)[2], 1e-13)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_bit_equal_for_any_number_of_threads(memory_format):
    tensors, constants = random_arguments(
        channels=150, outputs=40, groups=2, offset_groups=5, size=(31, 33), dtype=torch.float32
    )
    tensors[0].data = tensors[0].contiguous(memory_format=memory_format)
    grad = gradient_of(tensors, constants)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append([operator(*tensors, *constants), *operator_backward(grad, *tensors, *constants)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


# ---- types that differ, autocast --------------------------------------------------------------------


def test_mixed_types():
    tensors, constants = random_arguments(dtype=torch.bfloat16)
    types = (torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.float32)
    mixed = [t.to(d).requires_grad_() for t, d in zip(tensors, types, strict=True)]
    result = operator(*mixed, *constants)
    assert result.dtype == torch.bfloat16
    exact = [t.detach().double() for t in mixed]
    assert_near(result, reference.deform_conv2d(*exact, *constants), 2**-8)
    grad = torch.ones_like(result)
    expected = reference.deform_conv2d_backward(grad.double(), *exact, *constants)
    for gradient, tensor, exact_gradient in zip(torch.autograd.grad(result, mixed, grad), mixed, expected, strict=True):
        assert gradient.dtype == tensor.dtype
        assert_near(gradient, exact_gradient, torch.finfo(tensor.dtype).eps + 1e-6)


def test_gradient_of_another_type():
    tensors, constants = random_arguments(dtype=torch.bfloat16, channels=8, outputs=4)
    exact = [t.double() for t in tensors]
    grad = gradient_of(exact, constants).float()
    for memory_format in FORMATS:
        tensors[0].data = tensors[0].contiguous(memory_format=memory_format)
        gradients = operator_backward(grad, *tensors, *constants)
        assert gradients[0].is_contiguous(memory_format=memory_format)
        expected = reference.deform_conv2d_backward(grad.double(), *exact, *constants)
        for gradient, exact_gradient in zip(gradients, expected, strict=True):
            assert gradient.dtype == torch.bfloat16
            assert_near(gradient, exact_gradient, 2**-8)


def test_autocast():
    (input, weight, offset, mask, bias), _ = random_arguments(dtype=torch.float32)
    layer = torch.nn.Conv2d(4, 4, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = layer(input)
        result = deform_conv2d(features, offset, weight, bias, padding=1, mask=mask)
    assert features.dtype == result.dtype == torch.bfloat16
    expected = deform_conv2d(features.float(), offset, weight, bias, padding=1, mask=mask)
    torch.testing.assert_close(result, expected.bfloat16(), rtol=0, atol=0)
    result.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.abs().sum() > 0


# ---- memory ------------------------------------------------------------------------------------------

MEMORY = """
import sys
import torch, fastcv

def peak(name):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(name))

torch.set_num_threads(2)
memory_format = getattr(torch, sys.argv[1])
make = lambda *shape: torch.rand(*shape)
def arguments(size):
    x = make(1, 64, size, size).contiguous(memory_format=memory_format)
    return x, make(64, 64, 3, 3), make(1, 18, size, size), make(1, 9, size, size), make(64)
constants = (1, 1, 1, 1, 1, 1, 1, 1, True)
small = arguments(16)
grad = torch.ops.fastcv.deform_conv2d(*small, *constants)
torch.ops.fastcv.deform_conv2d_backward(grad, *small, *constants)
tensors = arguments(320)
grad = torch.rand(1, 64, 320, 320).contiguous(memory_format=memory_format)
for run, arguments in (
    (torch.ops.fastcv.deform_conv2d, tensors), (torch.ops.fastcv.deform_conv2d_backward, (grad, *tensors))
):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = peak("VmHWM")
    results = run(*arguments, *constants)
    results = (results,) if isinstance(results, torch.Tensor) else results
    added = peak("VmHWM") - before
    outputs = sum(4 * t.numel() for t in results)
    inputs = sum(4 * t.numel() for t in arguments)
    print(added, outputs, inputs)
    del results
"""


@pytest.mark.skipif(not fastcv._library.cpu_loaded, reason="the reference makes columns")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
def test_memory_without_columns(memory_format):
    """Beyond the results, at most a tenth of what goes in and out; the columns would be nine times the input."""
    command = [sys.executable, "-c", MEMORY, memory_format]
    # What is freed goes back to the system at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "FASTCV_MEMORY_CACHE": "0"}
    lines = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        added, outputs, inputs = map(int, line.split())
        assert outputs // 2 < added  # the measurement works
        assert added <= outputs + (outputs + inputs) // 10
