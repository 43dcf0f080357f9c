"""local_response_norm: AlexNet's two layers and GoogLeNet's, against torch on contiguous maps, its faster format."""

import torch
import torch.nn.functional as F

import fastcv
from benchmarks.harness import Case, as_test, backward, forward

# images, channels, height, width
SHAPES = {
    "AlexNet 1": (1, 96, 55, 55),
    "AlexNet 2": (1, 256, 27, 27),
    "GoogLeNet 1": (1, 64, 56, 56),
    "GoogLeNet 2, batch 8": (8, 192, 56, 56),
}


def _case(name, shape, channels_last=False, prepare=forward):
    def inputs():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
        x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        return (x.requires_grad_(prepare is backward), 5)

    def theirs(x, size):
        return prepare(F.local_response_norm)(x.detach().contiguous().requires_grad_(x.requires_grad), size)

    names = [name, f"{shape[1]} x {shape[2]} x {shape[3]}"]
    names += ["channels-last"] * channels_last + ["backward"] * (prepare is backward)
    contenders = {"fastcv": prepare(fastcv.ops.local_response_norm), "torch": theirs}
    return Case("local_response_norm", ", ".join(names), inputs, contenders)


CASES = [
    _case(name, shape, channels_last, prepare)
    for prepare in (forward, backward)
    for channels_last in (False, True)
    for name, shape in SHAPES.items()
]

test_local_response_norm = as_test(CASES)
