"""Pooling layers: those of torch.nn, exchanged."""

import pytest
import torch
from torch import nn

import fastcv

LAYERS = [
    ("MaxPool2d", (3, 2, 1), {"ceil_mode": True}),
    ("MaxPool2d", (2,), {"return_indices": True}),
    ("AvgPool2d", (3, 1, 1), {"count_include_pad": False}),
    ("AdaptiveAvgPool2d", ((2, None),), {}),
    ("AdaptiveMaxPool2d", (3,), {"return_indices": True}),
]


@pytest.mark.parametrize(("name", "arguments", "options"), LAYERS)
def test_like_torch(name, arguments, options):
    ours, theirs = (getattr(m, name)(*arguments, **options) for m in (fastcv.nn, nn))
    assert isinstance(ours, getattr(nn, name)) and repr(ours) == repr(theirs)
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x))


def test_repr_names_compact_indices():
    layer = fastcv.nn.MaxPool2d(2, return_indices=True, indices="compact")
    assert repr(layer) == repr(nn.MaxPool2d(2))[:-1] + ", indices='compact')"


def test_unpooling():
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    values, indices = nn.MaxPool2d(2, return_indices=True)(x)
    expected = nn.MaxUnpool2d(2)(values, indices, output_size=x.shape)
    unpool = fastcv.nn.MaxUnpool2d(2)
    assert torch.equal(unpool(values, indices, x.shape), expected)
    values, compact = fastcv.nn.MaxPool2d(2, return_indices=True, indices="compact")(x)
    assert torch.equal(unpool(values, compact), expected)


def test_pyramid():
    layer = fastcv.nn.SpatialPyramidPool2d((2, 1), "avg")
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), fastcv.ops.spatial_pyramid_pool(x, (2, 1), "avg"))
    assert repr(layer) == "SpatialPyramidPool2d(levels=(2, 1), mode='avg')" and not layer.state_dict()
