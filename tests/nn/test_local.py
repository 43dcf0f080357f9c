"""Locally connected layers: shapes, state dicts, training."""

import pytest
import torch

import fastcv


def test_locally_connected():
    torch.manual_seed(0)
    layer = fastcv.nn.LocallyConnected2d(3, 4, (6, 5), 3, stride=(2, 1), padding=1)
    assert layer.weight.shape == (3, 5, 4, 3, 3, 3) and layer.bias.shape == (4, 3, 5)
    x = torch.randn(2, 3, 6, 5)
    other = fastcv.nn.LocallyConnected2d(3, 4, (6, 5), 3, stride=(2, 1), padding=1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    target = torch.randn(2, 4, 3, 5)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-2
    with pytest.raises(ValueError, match="kernel_size"):
        fastcv.nn.LocallyConnected2d(3, 4, 2, 3)
