import itertools

import pytest
import torch
from torch import nn

from fastcv.ops.blocks import (
    MLP,
    Conv2dNormActivation,
    Conv3dNormActivation,
    FrozenBatchNorm2d,
    Permute,
    SqueezeExcitation,
)

CONV = {2: Conv2dNormActivation, 3: Conv3dNormActivation}


def randomize(module):
    generator = torch.Generator().manual_seed(0)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + ("var" in name))
    return module


def assert_interchangeable(mine, theirs, *inputs):
    """Same printed form, same keys in the same order, either loads the other, same outputs."""
    assert repr(mine) == repr(theirs)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    randomize(theirs)
    mine.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
    for mode in (True, False):
        results = []
        for module in (mine.train(mode), theirs.train(mode)):
            torch.manual_seed(0)
            results.append(module(*inputs))
        torch.testing.assert_close(*results)


# ---- by hand -------------------------------------------------------------------------------------


def test_frozen_batch_norm_by_hand():
    norm = FrozenBatchNorm2d(2, eps=0.0)
    norm.weight.copy_(torch.tensor([2.0, 1.0]))
    norm.bias.copy_(torch.tensor([1.0, 0.0]))
    norm.running_mean.copy_(torch.tensor([3.0, -1.0]))
    norm.running_var.copy_(torch.tensor([4.0, 0.25]))
    x = torch.tensor([5.0, 1.0]).view(1, 2, 1, 1)
    assert norm(x).flatten().tolist() == [(5 - 3) / 2 * 2 + 1, (1 + 1) / 0.5]


def test_squeeze_excitation_by_hand():
    block = SqueezeExcitation(2, 1, scale_activation=nn.Identity)
    with torch.no_grad():
        for value, parameter in zip([[1, 2], [-4], [1, 3], [0, 1]], block.parameters(), strict=True):
            parameter.copy_(torch.tensor(value).view(parameter.shape))
    x = torch.tensor([[1.0, 3.0], [0.0, 4.0]]).view(1, 2, 1, 2)
    # Means 2 and 2; relu(1 * 2 + 2 * 2 - 4) = 2; gates 1 * 2 + 0 and 3 * 2 + 1.
    assert block(x).flatten().tolist() == [2, 6, 0, 28]


def test_mlp_by_hand():
    mlp = MLP(1, [2, 1], bias=False)
    with torch.no_grad():
        mlp[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        mlp[3].weight.copy_(torch.tensor([[2.0, 5.0]]))
    assert mlp(torch.tensor([[3.0], [-3.0]])).flatten().tolist() == [6, 15]
    assert [type(layer) for layer in mlp] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.Dropout]


def test_permute_by_hand():
    x = torch.arange(6).view(1, 2, 3)
    assert Permute([2, 0, 1])(x).tolist() == [[[0, 3]], [[1, 4]], [[2, 5]]]


def test_conv_norm_activation_by_hand():
    block = Conv2dNormActivation(1, 1, kernel_size=3, norm_layer=None)
    with torch.no_grad():
        block[0].weight.fill_(1.0)
        block[0].bias.fill_(-5.0)
    x = torch.ones(1, 1, 3, 3)
    assert block(x)[0, 0].tolist() == [[0, 1, 0], [1, 4, 1], [0, 1, 0]]
    assert block.out_channels == 1


# ---- properties ----------------------------------------------------------------------------------


def test_frozen_batch_norm_is_batch_norm_in_evaluation():
    reference = randomize(nn.BatchNorm2d(5)).eval()
    norm = FrozenBatchNorm2d(5)
    state = reference.state_dict()
    assert "num_batches_tracked" in state
    norm.load_state_dict(state)  # strict, although FrozenBatchNorm2d has no such buffer
    nn.Sequential(norm).load_state_dict({f"0.{k}": v for k, v in state.items()})
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(1))
    for mode in (True, False):
        torch.testing.assert_close(norm.train(mode)(x), reference(x))
    assert not list(norm.parameters())
    assert norm(x[:0]).shape == (0, 5, 3, 4)
    assert norm(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dims", [2, 3])
def test_default_padding_keeps_the_size(dims):
    for kernel, dilation in itertools.product((1, 3, 5), (1, 2)):
        block = CONV[dims](2, 3, kernel, dilation=dilation)
        assert block(torch.zeros(2, 2, *[9] * dims)).shape == (2, 3, *[9] * dims)
    mixed = CONV[dims](2, 3, (1, 3, 5)[:dims], dilation=(1, 2, 3)[:dims])
    assert mixed[0].padding == (0, 2, 6)[:dims]


def test_bias_follows_normalization():
    assert Conv2dNormActivation(1, 1)[0].bias is None
    assert Conv2dNormActivation(1, 1, norm_layer=None)[0].bias is not None
    assert Conv2dNormActivation(1, 1, bias=True)[0].bias is not None
    assert Conv2dNormActivation(1, 1, norm_layer=None, bias=False)[0].bias is None


def test_gradients_reach_every_parameter():
    model = nn.Sequential(
        Conv2dNormActivation(2, 4, activation_layer=nn.SiLU),
        SqueezeExcitation(4, 3, nn.SiLU),
        FrozenBatchNorm2d(4),
        Permute([0, 2, 3, 1]),
        MLP(4, [5, 2], norm_layer=nn.LayerNorm, activation_layer=nn.GELU),
    )
    torch.manual_seed(2)
    model(torch.randn(2, 2, 5, 5)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_compiles_exports_and_traces():
    model = nn.Sequential(
        Conv2dNormActivation(2, 4), SqueezeExcitation(4, 3), FrozenBatchNorm2d(4),
        Permute([0, 2, 3, 1]), MLP(4, [5, 2]),
    ).eval()  # fmt: skip
    x = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(3))
    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},)).module()
    for other in (compiled, exported, torch.fx.symbolic_trace(model)):
        torch.testing.assert_close(other(x), expected)


# ---- against torchvision -------------------------------------------------------------------------

CONV_OPTIONS = [
    {},
    {"kernel_size": 5, "dilation": 2},
    {"kernel_size": 4},
    {"norm_layer": None},
    {"activation_layer": None},
    {"norm_layer": None, "activation_layer": None, "bias": False},
    {"activation_layer": nn.Sigmoid, "inplace": None},
    {"activation_layer": nn.Hardswish, "inplace": False},
    {"bias": True},
    {"padding": 0},
    {"padding": "same"},
    {"groups": 2},
    {"stride": 2, "norm_layer": FrozenBatchNorm2d},
]


@pytest.mark.parametrize("dims", [2, 3])
def test_conv_norm_activation_like_torchvision(dims):
    tv = pytest.importorskip("torchvision").ops
    theirs = {2: tv.Conv2dNormActivation, 3: tv.Conv3dNormActivation}[dims]
    x = torch.randn(2, 4, *[5] * dims, generator=torch.Generator().manual_seed(4))
    kernel, dilation = (1, 3, 5)[:dims], (2, 3, 1)[:dims]
    more = [{"kernel_size": kernel}, {"kernel_size": kernel, "dilation": dilation}]
    for options in CONV_OPTIONS + more:
        if dims == 3 and options.get("norm_layer") is FrozenBatchNorm2d:
            continue
        modules = []
        for cls in (CONV[dims], theirs):
            torch.manual_seed(5)
            modules.append(cls(4, 6, **options))
        for a, b in zip(*(m.parameters() for m in modules), strict=True):
            assert torch.equal(a, b)  # the same initial weights from the same seed
        assert_interchangeable(*modules, x)
        assert modules[0].out_channels == modules[1].out_channels


def test_squeeze_excitation_like_torchvision():
    tv = pytest.importorskip("torchvision").ops
    x = torch.randn(2, 8, 5, 4, generator=torch.Generator().manual_seed(6))
    for arguments in ((8, 2), (8, 3, nn.SiLU), (8, 1, nn.SiLU, nn.Hardsigmoid)):
        assert_interchangeable(SqueezeExcitation(*arguments), tv.SqueezeExcitation(*arguments), x)


def test_mlp_like_torchvision():
    tv = pytest.importorskip("torchvision").ops
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(7))
    for hidden, options in itertools.product(
        ([3], [5, 6], [7, 2, 3]),
        (
            {},
            {"norm_layer": nn.LayerNorm},
            {"activation_layer": nn.GELU, "bias": False},
            {"inplace": True, "dropout": 0.3},
            {"inplace": False},
        ),
    ):
        assert_interchangeable(MLP(4, hidden, **options), tv.MLP(4, hidden, **options), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_frozen_batch_norm_like_torchvision(dtype):
    tv = pytest.importorskip("torchvision").ops
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(8)).to(dtype)
    for eps in (1e-5, 0.0, 0.1):
        both = FrozenBatchNorm2d(5, eps), tv.FrozenBatchNorm2d(5, eps)
        assert_interchangeable(*both, x)  # float32 buffers: the wider type
        assert_interchangeable(*(m.to(dtype) for m in both), x)


def test_permute_like_torchvision():
    tv = pytest.importorskip("torchvision").ops
    x = torch.randn(2, 3, 4)
    for dims in itertools.permutations(range(3)):
        assert_interchangeable(Permute(list(dims)), tv.Permute(list(dims)), x)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Conv2dNormActivation(1, 1, (3, 3, 3)), r"kernel_size.*2 of them.*\(3, 3, 3\)"),
        (lambda: Conv3dNormActivation(1, 1, dilation=(1, 2)), r"dilation.*3 of them.*\(1, 2\)"),
        (lambda: MLP(4, []), "hidden_channels.*at least one"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
