"""What only a GPU shows: no waiting for the device, graphs, equal bits at every run, other devices' streams.

The operators' own tests run there by ``make test-gpu``; without a GPU all of this is skipped.
"""

import pytest
import torch

import fastcv
from fastcv import ops
from fastcv._library import triton_kernel

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


@pytest.fixture
def detections():
    """Boxes of 4 images and scores of 20 classes."""
    torch.manual_seed(0)
    corner = torch.rand(4, 1000, 2, device="cuda") * 500
    boxes = torch.cat([corner, corner + 10 + 90 * torch.rand(4, 1000, 2, device="cuda")], 2)
    return boxes, torch.rand(4, 20, 1000, device="cuda")


def on_cpu(tensors):
    return [t.cpu() for t in tensors]


def test_nms_padded_never_waits(detections):
    expected = ops.nms_padded(*on_cpu(detections), 0.5, 100, score_threshold=0.3)
    ops.nms_padded(*detections, 0.5, 100, score_threshold=0.3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = ops.nms_padded(*detections, 0.5, 100, score_threshold=0.3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for r, e in zip(result, expected, strict=True):
        assert torch.equal(r.cpu(), e)


def test_nms_padded_in_a_graph(detections):
    boxes, scores = detections
    run = lambda: ops.nms_padded(boxes, scores, 0.5, 100)  # noqa: E731
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    scores.copy_(scores.flip(2))
    graph.replay()
    for r, e in zip(result, ops.nms_padded(boxes.cpu(), scores.cpu(), 0.5, 100), strict=True):
        assert torch.equal(r.cpu(), e)


def test_nms_of_300000_boxes_needs_little_memory():
    torch.manual_seed(0)
    corner = torch.rand(300_000, 2, device="cuda") * 20_000
    boxes, scores = torch.cat([corner, corner + 50], 1), torch.rand(300_000, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    keep = ops.nms(boxes, scores, 0.5)
    assert torch.cuda.max_memory_allocated() - before < 100 * 2**20
    assert torch.equal(keep.cpu(), ops.nms(boxes.cpu(), scores.cpu(), 0.5))


def test_gradients_of_regions_are_the_same_bits():
    torch.manual_seed(0)
    x = torch.randn(2, 64, 100, 136, device="cuda", requires_grad=True)
    corner = torch.rand(500, 2, device="cuda") * 300
    boxes = torch.cat([torch.randint(0, 2, (500, 1), device="cuda"), corner, corner + 200], 1)
    torch.use_deterministic_algorithms(True)
    try:
        y = ops.roi_align(x, boxes, 7, 0.25, 2, True)
        grad = torch.randn_like(y)
        first = torch.autograd.grad(y, x, grad, retain_graph=True)[0]
        for _ in range(100):
            assert torch.equal(first, torch.autograd.grad(y, x, grad, retain_graph=True)[0])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("groups", [1, 64])
def test_gradients_of_weights_are_the_same_bits(groups):
    pytest.importorskip("triton")
    torch.manual_seed(0)
    x = torch.randn(8, 64, 56, 56, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    kernel, grad = triton_kernel("conv2d_weight_gradient"), torch.randn_like(x)
    options = [3, 3], groups, [1, 1], [1, 1], [1, 1], True
    first = kernel(grad, x, *options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        others = [kernel(grad, x, *options) for _ in range(100)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, other) for other in others)


def test_another_stream(detections):
    boxes, scores = detections[0][0], detections[1][0, 0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        keep = ops.nms(boxes, scores, 0.5)
    stream.synchronize()
    assert torch.equal(keep.cpu(), ops.nms(boxes.cpu(), scores.cpu(), 0.5))


# PyTorch's or cuDNN's serve these: kernels of our own are to come.
WITHOUT_KERNEL = ("conv2d", "conv_transpose2d", "gram_matrix", "local_response_norm", "style_loss")


def test_every_other_operator_has_a_kernel():
    operators = fastcv.build_info()["operators"].items()
    missing = [name for name, on in operators if on["cpu"] == "compiled" and on["cuda"] == "reference"]
    assert [name for name in missing if not name.startswith(WITHOUT_KERNEL)] == []
