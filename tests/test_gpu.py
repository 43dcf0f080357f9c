"""What only a GPU shows: no waiting for the device, graphs, equal bits at every run, other devices' streams.

The operators' own tests run there by ``make test-gpu``; without a GPU all of this is skipped.
"""

import pytest
import torch
from conftest import run_python

import fastcv
from fastcv import ops

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


def test_convolution_by_plan(tmp_path):
    """Measured once, as launched and for graphs, and remembered in another process."""
    script = """
import sys, torch, fastcv
from fastcv import _plan
torch.backends.cudnn.allow_tf32 = False
x = torch.randn(4, 64, 30, 30, device="cuda").contiguous(memory_format=torch.channels_last)
w = torch.randn(64, 64, 3, 3, device="cuda").contiguous(memory_format=torch.channels_last)
run = lambda: fastcv.ops.conv2d(x, w, padding=1, activation="relu")
measured = []
seconds, _plan.gpu_seconds = _plan.gpu_seconds, lambda thunks: measured.append(thunks) or seconds(thunks)
with torch.no_grad():
    y = run()
    with _plan.for_graphs():
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
    graph.replay()
expected = torch.conv2d(x.cpu(), w.cpu(), padding=1).relu()
for result in (y, captured):
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-3, atol=1e-3)
assert len(measured) == int(sys.argv[1]) and len(_plan.known_choices()) == 2
"""
    for count in "20":
        result = run_python(["-c", script, count], environment={"FASTCV_TRITON": "plan", "FASTCV_CACHE": str(tmp_path)})
        assert result.returncode == 0, result.stderr
