"""Upsampling layers against torch's."""

import pytest
import torch
from torch import nn

import fastcv


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Upsample", dict(scale_factor=2)),
        ("Upsample", dict(scale_factor=(1.5, 2.3), mode="bilinear")),
        ("Upsample", dict(scale_factor=2.6, mode="bilinear", recompute_scale_factor=True)),
        ("Upsample", dict(size=(9, 11), mode="bilinear", align_corners=True)),
        ("UpsamplingNearest2d", dict(size=(9, 11))),
        ("UpsamplingNearest2d", dict(scale_factor=3)),
        ("UpsamplingBilinear2d", dict(size=(9, 11))),
        ("UpsamplingBilinear2d", dict(scale_factor=2)),
    ],
)
def test_like_torch(name, options):
    x = torch.randn(2, 3, 5, 6)
    mine, theirs = getattr(fastcv.nn, name)(**options), getattr(nn, name)(**options)
    torch.testing.assert_close(mine(x), theirs(x))
    assert repr(mine) == repr(theirs)
