"""What the tests of the RoI operators share."""

from contextlib import contextmanager

import pytest
import torch

from fastcv._library import implementation

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FORMATS = (torch.contiguous_format, torch.channels_last)
# Of the result alone: coordinates are given in float64, so that those of both sides agree.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}

compiled_only = pytest.mark.skipif(
    implementation("roi_align", "cpu") != "compiled", reason="of the compiled kernel; the reference is plain PyTorch"
)


def random_case(generator, n, c, h, w, k, dtype=torch.float32, boxes_dtype=torch.float64):
    """Features, and regions inside, across and outside the border."""
    features = torch.randn(n, c, h, w, generator=generator, dtype=torch.float64).to(dtype)
    corners = (torch.rand(k, 2, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3) * torch.tensor([w, h])
    image = torch.randint(max(n, 1), (k, 1), generator=generator)
    boxes = torch.cat([image, corners.amin(1), corners.amax(1)], dim=1)
    return features, boxes.to(boxes_dtype)


@contextmanager
def one_thread():
    """For the reference, which makes many small steps."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
