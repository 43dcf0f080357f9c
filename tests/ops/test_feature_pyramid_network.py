from collections import OrderedDict

import pytest
import torch
from torch import nn

from fastcv.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)


def feature_maps(batch=2, channels=(4, 8, 6)):
    generator = torch.Generator().manual_seed(0)
    sizes = [(17, 13), (9, 7), (5, 4)]
    return OrderedDict(
        (f"c{i}", torch.randn(batch, c, *size, generator=generator))
        for i, (c, size) in enumerate(zip(channels, sizes, strict=False))
    )


def test_by_hand():
    fpn = FeaturePyramidNetwork([1, 1], 1)
    with torch.no_grad():
        for block, scale in zip(fpn.inner_blocks, (1.0, 10.0), strict=True):
            block[0].weight.fill_(scale)
        for block in fpn.layer_blocks:  # the 3x3 convolution picks its centre
            block[0].weight.zero_()[0, 0, 1, 1] = 1.0
    fine = torch.arange(9.0).view(1, 1, 3, 3)
    coarse = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    result = fpn({"fine": fine, "coarse": coarse})
    assert list(result) == ["fine", "coarse"]
    assert result["coarse"][0, 0].tolist() == [[10, 20], [30, 40]]
    # Nearest neighbours: rows and columns 0, 0, 1 of the coarse level.
    assert result["fine"][0, 0].tolist() == [[10, 11, 22], [13, 14, 25], [36, 37, 48]]


def test_last_levels_by_hand():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    levels, names = LastLevelMaxPool()([x], [], ["p5"])
    assert names == ["p5", "pool"] and levels[0] is x
    assert levels[1].flatten().tolist() == [0, 2, 6, 8]

    block = LastLevelP6P7(1, 1)
    with torch.no_grad():
        block.p6.weight.zero_()[0, 0, 1, 1] = -1.0
        block.p7.weight.zero_()[0, 0, 1, 1] = 2.0
    levels, names = block([x - 1], [x], ["p5"])  # equal channels: p6 comes from p5
    assert names == ["p5", "p6", "p7"]
    assert levels[1].flatten().tolist() == [1, -1, -5, -7]
    assert levels[2].flatten().tolist() == [2]
    other = LastLevelP6P7(2, 1)
    assert not other.use_P5
    levels, _ = other([x], [torch.cat((x, x), dim=1)], ["p5"])
    assert levels[1].shape == (1, 1, 2, 2)


# ---- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d])
def test_shapes_names_and_gradients(norm_layer):
    maps = feature_maps()
    fpn = FeaturePyramidNetwork([4, 8, 6], 5, LastLevelP6P7(6, 5), norm_layer)
    result = fpn(maps)
    assert isinstance(result, OrderedDict) and list(result) == ["c0", "c1", "c2", "p6", "p7"]
    sizes = [(17, 13), (9, 7), (5, 4), (3, 2), (2, 1)]
    assert [tuple(level.shape) for level in result.values()] == [(2, 5, *size) for size in sizes]
    sum(level.square().sum() for level in result.values()).backward()
    assert all(p.grad.isfinite().all() for p in fpn.parameters())
    assert all(p.grad.abs().sum() > 0 for p in fpn.parameters() if p.dim() == 4)
    assert list(fpn(feature_maps(batch=1))) == list(result)


def test_empty_batch():
    result = FeaturePyramidNetwork([4, 8], 5, LastLevelMaxPool())(feature_maps(0, (4, 8)))
    assert [len(level) for level in result.values()] == [0, 0, 0]


def test_old_state_dict():
    """Before the convolutions became blocks: inner_blocks.0.weight for inner_blocks.0.0.weight."""
    source = FeaturePyramidNetwork([4, 8, 6], 5)
    old = {k.replace(".0.weight", ".weight").replace(".0.bias", ".bias"): v
           for k, v in source.state_dict().items()}  # fmt: skip
    assert "inner_blocks.2.weight" in old and "layer_blocks.0.bias" in old
    target = nn.Sequential(FeaturePyramidNetwork([4, 8, 6], 5))
    target.load_state_dict({f"0.{k}": v for k, v in old.items()})
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(a, b)


def test_own_extra_block():
    class Double(ExtraFPNBlock):
        def forward(self, results, x, names):
            return [*results, 2 * x[-1]], [*names, "double"]

    maps = feature_maps()
    result = FeaturePyramidNetwork([4, 8, 6], 5, Double())(maps)
    assert torch.equal(result["double"], 2 * maps["c2"])


def test_compiles_and_exports():
    fpn = FeaturePyramidNetwork([4, 8, 6], 5, LastLevelP6P7(6, 5)).eval()
    maps = dict(feature_maps())
    expected = fpn(maps)
    compiled = torch.compile(fpn, backend="eager", fullgraph=True)
    exported = torch.export.export(fpn, (maps,)).module()
    for other in (compiled, exported):
        torch.testing.assert_close(dict(other(maps)), dict(expected))


# ---- against torchvision -------------------------------------------------------------------------


def pairs(tv, norm_layer):
    """The same network from both libraries, each built from the same seed."""
    last = tv.feature_pyramid_network
    builders = [
        (lambda: None, lambda: None),
        (LastLevelMaxPool, last.LastLevelMaxPool),
        (lambda: LastLevelP6P7(6, 5), lambda: last.LastLevelP6P7(6, 5)),
        (lambda: LastLevelP6P7(5, 5), lambda: last.LastLevelP6P7(5, 5)),
    ]
    for mine, theirs in builders:
        networks = []
        for cls, extra in ((FeaturePyramidNetwork, mine), (tv.FeaturePyramidNetwork, theirs)):
            torch.manual_seed(1)
            networks.append(cls([4, 8, 6], 5, extra(), norm_layer))
        yield networks


@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d])
def test_like_torchvision(norm_layer):
    tv = pytest.importorskip("torchvision").ops
    for mine, theirs in pairs(tv, norm_layer):
        assert repr(mine) == repr(theirs)
        assert list(mine.state_dict()) == list(theirs.state_dict())
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():
            for p in theirs.parameters():
                p.uniform_(-1, 1)
        mine.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(mine.state_dict())
        result, expected = mine(feature_maps()), theirs(feature_maps())
        assert list(result) == list(expected)
        torch.testing.assert_close(result, expected)


def test_accepts_extra_blocks_of_torchvision():
    tv = pytest.importorskip("torchvision").ops
    extra = tv.feature_pyramid_network.LastLevelMaxPool()
    result = FeaturePyramidNetwork([4, 8, 6], 5, extra)(feature_maps())
    assert list(result) == ["c0", "c1", "c2", "pool"]


# ---- errors --------------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(ValueError, match=r"in_channels_list.*at least 1.*\[4, 0\]"):
        FeaturePyramidNetwork([4, 0], 5)
    with pytest.raises(TypeError, match=r"extra_blocks.*ExtraFPNBlock.*'pool'"):
        FeaturePyramidNetwork([4], 5, "pool")
    with pytest.raises(ValueError, match="x: expected 2 feature maps, got 3"):
        FeaturePyramidNetwork([4, 8], 5)(feature_maps())
    with pytest.raises(NotImplementedError, match="forward"):
        ExtraFPNBlock()([], [], [])
