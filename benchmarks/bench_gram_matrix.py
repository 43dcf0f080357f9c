"""gram_matrix and style_loss: the layers of VGG-19 that style transfer takes, for an image of 512 x 512.

torch's side is the usual formulation, ``bmm`` of the features and their transpose, on contiguous features.
"""

import torch

import fastcv
from benchmarks.harness import Case, as_test, forward

# channels, height, width: relu1_1, 2_1, 3_1, 4_1, 5_1 of 512 x 512, and the 256 x 65536
LAYERS = [(64, 512, 512), (128, 256, 256), (256, 128, 128), (512, 64, 64), (512, 32, 32)]
SHAPES = [*LAYERS, (256, 256, 256)]


def _theirs(x):
    flat = x.flatten(2)
    return torch.bmm(flat, flat.mT) / flat[0].numel()


def _their_loss(*tensors):
    half = len(tensors) // 2
    terms = [(_theirs(f) - t).square().sum() / 4 for f, t in zip(tensors[:half], tensors[half:], strict=True)]
    return sum(terms) / half


def _our_loss(*tensors):
    half = len(tensors) // 2
    return fastcv.ops.style_loss(tensors[:half], tensors[half:])


def _with_gradient(function):
    def prepare(*inputs):
        wanted = [x.detach().requires_grad_() if x.dim() == 4 else x for x in inputs]

        def call():
            result = function(*wanted)
            return torch.autograd.grad(result.sum(), [x for x in wanted if x.requires_grad])

        return call

    return prepare


def _features(shape, channels_last=False, dtype=torch.float32):
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def _case(shape, channels_last=False, dtype=torch.float32, gradient=False):
    prepare = _with_gradient if gradient else forward
    c, h, w = shape
    names = [
        f"{c} x {h * w}",
        *(["channels-last"] if channels_last else []),
        *([str(dtype)[6:]] * (dtype != torch.float32)),
    ]

    def theirs(x):
        return prepare(_theirs)(x.contiguous())

    return Case(
        "gram_matrix",
        ", ".join([*names, *(["forward and backward"] if gradient else [])]),
        lambda: (_features(shape, channels_last, dtype),),
        {"fastcv": prepare(lambda x: fastcv.ops.gram_matrix(x)), "torch": theirs},
        tolerance=1e-4 if dtype == torch.float32 else 2e-2,
        quick=shape[0] == 512,
    )


def _style():
    maps = [_features(shape) for shape in LAYERS]
    return *maps, *(_theirs(x * 0.5) for x in maps)


CASES = [
    *(_case(shape) for shape in SHAPES),
    *(_case(shape, gradient=True) for shape in SHAPES),
    _case(SHAPES[2], channels_last=True),
    _case(SHAPES[2], channels_last=True, gradient=True),
    _case(SHAPES[2], dtype=torch.bfloat16),
    Case(
        "style_loss",
        "VGG-19, 512 x 512, forward and backward",
        _style,
        {"fastcv": _with_gradient(_our_loss), "torch": _with_gradient(_their_loss)},
    ),
]

test_gram_matrix = as_test(CASES)
