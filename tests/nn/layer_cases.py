"""What the tests of layers with weights share."""

import torch
from torch import nn

import fastcv

NEAR = dict(rtol=1e-4, atol=1e-5)


def pair(name, *args, **kwargs):
    """fastcv's layer and torch's with the same weights."""
    torch.manual_seed(0)
    theirs, mine = getattr(nn, name)(*args, **kwargs), getattr(fastcv.nn, name)(*args, **kwargs)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def check_convolution(mine, theirs, x):
    """With and without gradients, single images, gradients; returns torch's output."""
    expected = theirs(x)
    torch.testing.assert_close(mine(x), expected, **NEAR)
    with torch.inference_mode():
        torch.testing.assert_close(mine(x), expected, **NEAR)
        torch.testing.assert_close(mine(x[0]), expected[0], **NEAR)
        result = mine(x, activation="relu", residual=expected)
        torch.testing.assert_close(result, (2 * expected).relu(), **NEAR)
    v = torch.randn_like(expected)
    ours = torch.autograd.grad((mine(x) * v).sum(), [x, *mine.parameters()])
    others = torch.autograd.grad((expected * v).sum(), [x, *theirs.parameters()])
    torch.testing.assert_close(ours, others, rtol=1e-4, atol=1e-4)
    assert repr(mine) == repr(theirs)
    return expected


def train_a_step(mine, theirs, x):
    """Both run in inference, then take a step, which what was laid out before must not outlive."""
    for layer in (mine, theirs):
        with torch.inference_mode():
            layer(x)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer(x).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(mine.weight.grad, theirs.weight.grad)
    with torch.inference_mode():
        torch.testing.assert_close(mine(x), theirs(x), **NEAR)
