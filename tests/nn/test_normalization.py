"""Normalisation layers against torch's."""

import torch
from torch import nn

import fastcv


def test_local_response_norm():
    mine, theirs = fastcv.nn.LocalResponseNorm(5, 1e-2, 0.6, 2.0), nn.LocalResponseNorm(5, 1e-2, 0.6, 2.0)
    for shape in ((2, 8, 5), (2, 8, 5, 4), (2, 8, 3, 4, 5)):
        x = torch.randn(shape)
        torch.testing.assert_close(mine(x), theirs(x))
    assert repr(mine) == repr(theirs)
