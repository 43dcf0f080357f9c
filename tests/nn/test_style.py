"""Layers of style transfer: what they compute, buffers, state dicts."""

import torch

import fastcv


def test_gram_matrix():
    x = torch.randn(2, 5, 4, 3)
    assert torch.equal(fastcv.nn.GramMatrix("positions")(x), fastcv.ops.gram_matrix(x, normalize="positions"))
    assert repr(fastcv.nn.GramMatrix("positions")) == "GramMatrix(normalize='positions')"


def test_style_loss_optimises():
    """Gradient descent on features approaches the style's statistics."""
    torch.manual_seed(0)
    style = [torch.randn(1, 4, 6, 6), torch.randn(1, 8, 3, 3)]
    loss = fastcv.nn.StyleLoss([fastcv.ops.gram_matrix(f) for f in style], [1.0, 2.0])
    assert loss(style).item() < 1e-12
    copy = fastcv.nn.StyleLoss([torch.zeros(1, 4, 4), torch.zeros(1, 8, 8)], [1.0, 2.0])
    copy.load_state_dict(loss.state_dict())
    features = [torch.randn_like(f).requires_grad_() for f in style]
    assert torch.equal(copy(features), loss(features))
    assert copy.double().target0.dtype == torch.float64
    first = loss(features).item()
    optimizer = torch.optim.Adam(features, 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss(features).backward()
        optimizer.step()
    assert loss(features).item() < first / 20
