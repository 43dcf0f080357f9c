"""deform_conv2d: derivatives, torch.compile, export and vmap, its layer, torchvision's arguments, errors."""

import itertools
import warnings

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
from torch.autograd import gradcheck, gradgradcheck

import fastcv
from fastcv.ops import DeformConv2d, deform_conv2d

# ---- derivatives -------------------------------------------------------------------------------------


def small(masked, **changes):
    settings = {"batch": 1, "channels": 2, "outputs": 2, "size": (4, 3), "kernel": (2, 1), "masked": masked}
    tensors, constants = random_arguments(seed=5, **(settings | changes))
    used = [t.requires_grad_() for t in tensors if t.numel()]

    def run(*arguments):
        arguments = list(arguments)
        if not masked:
            arguments.insert(3, arguments[0].new_empty(0))
        return operator(*arguments, *constants)

    return run, used


@pytest.mark.parametrize("changes", [{}, {"groups": 2, "offset_groups": 2, "stride": (1, 2), "dilation": (2, 1)}])
@pytest.mark.parametrize("masked", [True, False])
def test_gradcheck(masked, changes):
    run, tensors = small(masked, **changes)
    assert gradcheck(run, tensors, check_forward_ad=True)

    def run_channels_last(input, *rest):
        return run(input.contiguous(memory_format=torch.channels_last), *rest)

    assert gradcheck(run_channels_last, tensors, fast_mode=True)


@pytest.mark.parametrize("masked", [True, False])
def test_gradgradcheck(masked):
    run, tensors = small(masked, offset_groups=2, groups=2)
    assert gradgradcheck(run, tensors, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("which", range(5))
def test_nested_transforms(which):
    """Second derivatives by any two modes are those of the reference."""
    tensors, constants = random_arguments(
        batch=1, channels=1, outputs=1, size=(3, 3), kernel=(1, 1), padding=(0, 0), seed=3
    )

    def energy(op):
        def run(value):
            arguments = [value if i == which else t for i, t in enumerate(tensors)]
            return (op(*arguments, *constants) ** 3).sum()

        return run

    modes = (torch.func.jacfwd, torch.func.jacrev)
    expected = torch.func.hessian(energy(reference.deform_conv2d))(tensors[which])
    assert expected.abs().max() > 1e-3
    for outer, inner in itertools.product(modes, modes):
        result = outer(inner(energy(operator)))(tensors[which])
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_jvp_and_vjp_agree():
    run, tensors = small(True)
    tensors = tuple(t.detach() for t in tensors)
    g = torch.Generator().manual_seed(6)
    tangents = tuple(torch.randn(t.shape, generator=g, dtype=t.dtype) for t in tensors)
    output, pushed = torch.func.jvp(run, tensors, tangents)
    cotangent = torch.randn(output.shape, generator=g, dtype=output.dtype)
    _, pull = torch.func.vjp(run, *tensors)
    products = sum((a * b).sum() for a, b in zip(pull(cotangent), tangents, strict=True))
    torch.testing.assert_close(products, (pushed * cotangent).sum())


# ---- the dispatcher's other ways ------------------------------------------------------------------------


@pytest.mark.parametrize(("masked", "memory_format"), [(True, FORMATS[0]), (False, FORMATS[1])])
def test_opcheck(masked, memory_format):
    tensors, constants = random_arguments(
        dtype=torch.float32, masked=masked, groups=2, offset_groups=2, size=(3, 4), kernel=(2, 1), padding=(1, 0)
    )
    tensors[0].data = tensors[0].contiguous(memory_format=memory_format)
    tensors = [t.requires_grad_() if t.numel() else t for t in tensors]
    torch.library.opcheck(operator.default, (*tensors, *constants))
    grad = gradient_of([t.detach() for t in tensors], constants)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if masked:  # slow: it traces the derivatives of the backward pass
        checks.append("test_aot_dispatch_dynamic")
    arguments = (grad, *tensors, *constants, 31 if masked else 5)
    torch.library.opcheck(operator_backward.default, arguments, test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_compile(memory_format, dynamic):
    layer = DeformConv2d(4, 6, 3, padding=1, groups=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((7, 9), (8, 5)):
        (input, _, offset, mask, _), _ = random_arguments(size=size, dtype=torch.float32)
        inputs = [input.contiguous(memory_format=memory_format), offset, mask]
        results = []
        for run in (layer, compiled):
            leaves = [t.detach().requires_grad_() for t in inputs]
            output = run(*leaves)
            gradients = torch.autograd.grad(output.square().sum(), [*leaves, *layer.parameters()])
            results.append((output, *gradients))
        for eager, other in zip(*results, strict=True):
            assert eager.stride() == other.stride()
            torch.testing.assert_close(eager, other, rtol=0, atol=0)


def test_export():
    layer = DeformConv2d(4, 6, 3, padding=1)
    (input, _, offset, mask, _), _ = random_arguments(dtype=torch.float32)
    program = torch.export.export(layer, (input, offset, mask))
    torch.testing.assert_close(program.module()(input, offset, mask), layer(input, offset, mask))


@pytest.mark.parametrize("masked", [True, False])
def test_vmap(masked):
    """Mapped over any of the arguments, forward and backward."""
    size = 3
    batches = [
        random_arguments(seed=i, channels=4, groups=2, offset_groups=2, masked=masked, size=(4, 5)) for i in range(size)
    ]
    constants = batches[0][1]
    stacked = [torch.stack(ts) for ts in zip(*(tensors for tensors, _ in batches), strict=True)]
    grads = torch.stack([gradient_of(tensors, constants, i) for i, (tensors, _) in enumerate(batches)])
    used = [0, 1, 2, 4, *([3] if masked else [])]
    for mapped in [(i,) for i in used] + [(0, 2), tuple(used)]:
        in_dims = [0 if i in mapped else None for i in range(5)]
        # Somewhere else than in front, too.
        moved = [
            t.movedim(0, 1) if d == 0 and i == 0 else t if d == 0 else t[0]
            for i, (t, d) in enumerate(zip(stacked, in_dims, strict=True))
        ]
        dims = [1 if d == 0 and i == 0 else d for i, d in enumerate(in_dims)]
        one = [[t[b] if d == 0 else t[0] for t, d in zip(stacked, in_dims, strict=True)] for b in range(size)]
        result = torch.vmap(lambda *t: operator(*t, *constants), tuple(dims))(*moved)
        expected = torch.stack([operator(*tensors, *constants) for tensors in one])
        torch.testing.assert_close(result, expected)
        for needs in (31, 5):

            def backward(grad, *tensors, needs=needs):
                return operator_backward(grad, *tensors, *constants, needs)

            for grad_dim in (0, None):
                grad = grads if grad_dim == 0 else grads[0]
                result = torch.vmap(backward, (grad_dim, *dims))(grad, *moved)
                each = [backward(grads[b] if grad_dim == 0 else grad, *one[b]) for b in range(size)]
                for i, (r, e) in enumerate(zip(result, zip(*each, strict=True), strict=True)):
                    if i in used and needs >> i & 1:
                        torch.testing.assert_close(r, torch.stack(e))


def test_per_sample_gradients():
    tensors, constants = random_arguments(batch=3)
    input, weight, offset, mask, bias = tensors

    def loss(weight, input, offset, mask):
        output = operator(input[None], weight, offset[None], mask[None], bias, *constants)
        return output.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(weight, input, offset, mask)
    for i in range(3):
        expected = torch.func.grad(loss)(weight, input[i], offset[i], mask[i])
        torch.testing.assert_close(each[i], expected)


# ---- the layer ---------------------------------------------------------------------------------------


def test_layer():
    layer = DeformConv2d(4, 6, (3, 1), stride=2, padding=(1, 0), dilation=2, groups=2)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {"weight": (6, 2, 3, 1), "bias": (6,)}
    assert repr(layer) == (
        "DeformConv2d(4, 6, kernel_size=(3, 1), stride=(2, 2), padding=(1, 0), dilation=(2, 2), groups=2)"
    )
    assert (
        repr(DeformConv2d(1, 1, 1, bias=False)) == "DeformConv2d(1, 1, kernel_size=(1, 1), stride=(1, 1), bias=False)"
    )
    input, offset = torch.rand(1, 4, 9, 8), torch.rand(1, 6, 4, 4)
    expected = deform_conv2d(input, offset, layer.weight, layer.bias, 2, (1, 0), 2)
    torch.testing.assert_close(layer(input, offset), expected, rtol=0, atol=0)
    conv = torch.nn.Conv2d(4, 6, (3, 1), groups=2)
    for parameters in (layer, conv):
        torch.manual_seed(0)
        parameters.reset_parameters()
    assert torch.equal(layer.weight, conv.weight) and torch.equal(layer.bias, conv.bias)
    for wrong in ({"in_channels": 5}, {"out_channels": 5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DeformConv2d(**({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2} | wrong))


# ---- against torchvision -----------------------------------------------------------------------------


def random_configuration(g):
    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    groups, offset_groups = pick(1, 3), pick(1, 3)
    kernel = (pick(1, 4), pick(1, 4))
    dilation = (pick(1, 2), pick(1, 2))
    padding = (pick(0, 3), pick(0, 3))
    size = [max(pick(1, 12), d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    return {
        "batch": pick(1, 3), "channels": groups * offset_groups * pick(1, 5), "outputs": groups * pick(1, 9),
        "size": tuple(size), "kernel": kernel, "groups": groups, "offset_groups": offset_groups,
        "masked": bool(pick(0, 1)), "stride": (pick(1, 3), pick(1, 3)), "padding": padding, "dilation": dilation,
        "spread": float(pick(0, 4)) / 2,
    }  # fmt: skip


def test_like_torchvision():
    """200 random small configurations, forward and backward."""
    tv = pytest.importorskip("torchvision").ops
    g = torch.Generator().manual_seed(11)
    for number in range(200):
        configuration = random_configuration(g)
        dtype = torch.float64 if number % 2 else torch.float32
        (input, weight, offset, mask, bias), constants = random_arguments(seed=number, dtype=dtype, **configuration)
        if number % 3 == 0:
            input = input.contiguous(memory_format=torch.channels_last)
        stride, padding, dilation = constants[:2], constants[2:4], constants[4:6]
        leaves = [input, offset, weight, bias, *([mask] if configuration["masked"] else [])]
        results = []
        for run in (deform_conv2d, tv.deform_conv2d):
            inputs = [t.detach().requires_grad_() for t in leaves]
            output = run(*inputs[:4], stride, padding, dilation, inputs[4] if len(inputs) == 5 else None)
            weights = torch.linspace(-0.3, 1, output.numel(), dtype=dtype).view_as(output)
            results.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
        for mine, theirs in zip(*results, strict=True):
            assert_near(mine, theirs, 1e-12 if dtype == torch.float64 else 1e-5)


def test_operator_like_torchvision():
    """The same order of arguments, so that one can stand for the other."""
    tv = pytest.importorskip("torchvision").ops
    tensors, constants = random_arguments(
        channels=12, groups=2, offset_groups=3, stride=(2, 1), padding=(1, 2), dilation=(1, 2), kernel=(3, 2)
    )
    theirs = torch.ops.torchvision.deform_conv2d
    names = [a.name for a in theirs.default._schema.arguments]
    assert [a.name for a in operator.default._schema.arguments] == names
    torch.testing.assert_close(operator(*tensors, *constants), theirs(*tensors, *constants))
    assert tv.deform_conv2d is not deform_conv2d


def test_layer_like_torchvision():
    tv = pytest.importorskip("torchvision").ops
    settings = {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2}
    torch.manual_seed(0)
    mine = DeformConv2d(4, 6, **settings)
    torch.manual_seed(0)
    theirs = tv.DeformConv2d(4, 6, **settings)
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert mine.load_state_dict(theirs.state_dict()) is not None and repr(mine) != ""


# ---- errors ------------------------------------------------------------------------------------------


def arguments_by_name():
    (input, weight, offset, mask, bias), _ = random_arguments(dtype=torch.float32)
    return {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask, "padding": 1}


@pytest.mark.parametrize(
    ("error", "pattern", "changes"),
    [
        (TypeError, r"input: expected a Tensor, got list", {"input": [1]}),
        (TypeError, r"offset.*int64", {"offset": torch.zeros(2, 18, 7, 9, dtype=torch.int64)}),
        (TypeError, r"weight.*float32.*float64", {"weight": torch.zeros(6, 4, 3, 3, dtype=torch.float64)}),
        (ValueError, r"input.*\[N, C, H, W\].*\[4, 7, 9\]", {"input": torch.zeros(4, 7, 9)}),
        (ValueError, r"weight.*kh, kw.*\[6, 4, 3\]", {"weight": torch.zeros(6, 4, 3)}),
        (ValueError, r"weight.*4 channels, got 3", {"weight": torch.zeros(6, 3, 3, 3)}),
        (ValueError, r"weight.*multiple of 2 groups.*got 5", {"weight": torch.zeros(5, 2, 3, 3)}),
        (ValueError, r"offset.*\[2, G \* 18, 7, 9\].*\[2, 18, 7, 8\]", {"offset": torch.zeros(2, 18, 7, 8)}),
        (ValueError, r"offset.*2 \* 9.*got 17", {"offset": torch.zeros(2, 17, 7, 9)}),
        (ValueError, r"offset.*divisor of input's 4.*got 54", {"offset": torch.zeros(2, 54, 7, 9)}),
        (ValueError, r"mask.*\[2, 9, 7, 9\].*\[2, 18, 7, 9\]", {"mask": torch.zeros(2, 18, 7, 9)}),
        (ValueError, r"bias.*\[6\].*\[5\]", {"bias": torch.zeros(5)}),
        (ValueError, r"stride.*at least 1.*0", {"stride": 0}),
        (ValueError, r"padding.*at least 0.*-1", {"padding": (1, -1)}),
        (ValueError, r"dilation.*pair.*\(1, 1, 1\)", {"dilation": (1, 1, 1)}),
        (ValueError, r"input.*hold a kernel.*\(7, 9\)", {"dilation": 9}),
        (ValueError, r"mask.*device.*meta", {"mask": torch.zeros(2, 9, 7, 9, device="meta")}),
    ],
)
def test_errors(error, pattern, changes):
    with pytest.raises(error, match=pattern):
        deform_conv2d(**(arguments_by_name() | changes))


@pytest.mark.skipif(not fastcv._library.cpu_loaded, reason="checks of the compiled part")
def test_errors_of_the_operator():
    """What would read out of bounds is caught below Python, too."""
    (input, weight, offset, mask, bias), constants = random_arguments(dtype=torch.float32)
    for wrong, pattern in [
        ((input, weight, offset[..., :-1], mask, bias, *constants), "offset"),
        ((input, weight, offset, mask[:, :-1], bias, *constants), "mask"),
        ((input, weight, offset, mask, bias[:-1], *constants), "bias"),
        ((input, weight[:, :-1], offset, mask, bias, *constants), "groups"),
        ((input, weight, offset.double(), mask, bias, *constants), "float64"),
        ((input, weight, offset, mask, bias, 0, *constants[1:]), "stride"),
        ((input, weight, offset, mask, bias, 1, 1, 2**40, *constants[3:]), "padding"),
        ((input, weight, offset, mask, bias, *constants[:7], 3, True), "offset_groups"),
        ((input.int(), weight, offset, mask, bias, *constants), "input"),
    ]:
        with pytest.raises(RuntimeError, match=pattern):
            operator(*wrong)
    grad = gradient_of((input, weight, offset, mask, bias), constants)
    with pytest.raises(RuntimeError, match="grad"):
        operator_backward(grad[:, :-1], input, weight, offset, mask, bias, *constants)


def test_no_warnings():
    (input, weight, offset, mask, bias), _ = random_arguments(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deform_conv2d(input, offset, weight, bias, padding=1, mask=mask)
