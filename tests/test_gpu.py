"""What only a GPU shows: no waiting for the device, graphs, equal bits at every run, other devices' streams.

The operators' own tests run there by ``make test-gpu``; without a GPU all of this is skipped.
"""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import run_python
from torch import nn

import fastcv
from fastcv import ops
from fastcv._library import triton_kernel
from fastcv.accelerate import whole_detector
from fastcv.accelerate._graphs import Graphs
from fastcv.demo.detector import same_detections

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

sys.path.append(str(Path(__file__).parent / "accelerate"))
from program_cases import STEPS, Block, Function, Pyramid, Unpooled, generator, randomise_norms


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


@pytest.fixture
def detector():
    detection = pytest.importorskip("torchvision").models.detection
    torch.manual_seed(0)
    model = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=320, box_score_thresh=0.0)
    with torch.no_grad():  # scores further apart than random weights give: equal ones have no order
        model.rpn.head.cls_logits.weight.mul_(100)
        model.roi_heads.box_predictor.cls_score.weight.mul_(30)
    return whole_detector(model.eval().cuda())


def photographs():
    return [torch.rand(3, 200, 260, device="cuda"), torch.rand(3, 240, 200, device="cuda")]


def inputs_of(detector, images):
    batch, *sizes = detector.prepare(images)
    return batch, *(torch.tensor(pairs, device="cuda") for pairs in sizes)


@torch.inference_mode()
def test_a_whole_detector_waits_once(detector):
    images = photographs()
    result = detector(images)
    inputs = inputs_of(detector, images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        detector.prepare(images)
        detector.detect(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for found, expected in zip(result, detector.model(images), strict=True):
        same_detections(found, expected)


@torch.inference_mode()
def test_a_whole_detector_in_a_graph(detector):
    inputs = inputs_of(detector, photographs())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        detector.detect(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = detector.detect(*inputs)
    for old, new in zip(inputs, inputs_of(detector, photographs()), strict=True):
        old.copy_(new)
    graph.replay()
    for result, expected in zip(outputs, detector.detect(*inputs), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_an_accelerated_detector_replays_graphs(detector):
    fast = fastcv.accelerate(detector.model, graphs=True)
    assert "detections as graphs" in str(fast.fastcv_report)
    with torch.inference_mode():
        for images in (photographs(), photographs()[:1], photographs()):
            for found, expected in zip(fast(images), detector.model(images), strict=True):
                same_detections(found, expected)


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


# ---- accelerate ----------------------------------------------------------------------------------

MODELS = {name: lambda name=name: Function(copy.deepcopy(STEPS[name])) for name in STEPS} | {
    "unpooled": lambda: nn.Sequential(nn.Conv2d(12, 5, 1), Unpooled()),
    "pyramid": lambda: nn.Sequential(nn.Conv2d(12, 3, 1), Pyramid()),
    "layer_norm": lambda: nn.Sequential(Block(12), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 7)),
}
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.06}


@pytest.fixture
def without_tf32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def assert_near(result, expected, tolerance):
    assert result.dtype == expected.dtype and result.shape == expected.shape
    assert (result.cpu() - expected.cpu()).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", MODELS)
def test_accelerated_models(name, dtype, without_tf32):
    if name == "unpooled" and dtype != torch.float32:
        pytest.skip("rounding moves maxima")
    torch.manual_seed(0)
    model = randomise_norms(MODELS[name]().eval())
    fast = fastcv.accelerate(copy.deepcopy(model).cuda(), dtype=dtype, graphs=True)
    with torch.inference_mode():
        for size in ((2, 12, 16, 20), (1, 12, 24, 12), (2, 12, 16, 20)):
            x = torch.randn(size)
            for _ in range(2):
                assert_near(fast(x.cuda()), model(x), TOLERANCES[dtype])
    (part,) = fast.fastcv_report.parts
    assert "on cuda:0 in" in str(part) and not fast.fastcv_report.left


def test_accelerated_vectors(without_tf32):
    torch.manual_seed(0)
    model, x = generator(), torch.randn(5, 20, 1, 1)
    fast = fastcv.accelerate(copy.deepcopy(model).cuda())
    with torch.inference_mode():
        for _ in range(2):
            assert_near(fast(x.cuda()), model(x), 1e-4)


def small_model():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 8, 3), nn.SiLU())
    return randomise_norms(nn.Sequential(*layers).eval()).cuda()


def test_a_model_that_is_moved(without_tf32):
    model = small_model()
    fast, x = fastcv.accelerate(model), torch.randn(2, 3, 20, 20, device="cuda")
    with torch.inference_mode():
        expected = model(x)
        fast(x)
        assert_near(fast(x), expected, 1e-4)
        assert_near(fast.cpu()(x.cpu()), expected, 1e-4)
        assert_near(fast.cuda()(x), expected, 1e-4)


def test_accelerated_models_never_wait():
    fast, x = fastcv.accelerate(small_model(), graphs=True), torch.randn(2, 3, 20, 20, device="cuda")
    with torch.inference_mode():
        fast(x), fast(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            fast(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_under_autocast_and_with_gradients_models_run_as_before():
    model = small_model()
    fast, x = fastcv.accelerate(model, graphs=True), torch.randn(2, 3, 20, 20, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        assert fast(x).dtype == torch.bfloat16
    fast(x).sum().backward()
    assert x.grad is not None


def test_graphs_see_changed_parameters(without_tf32):
    model = small_model()
    fast, x = fastcv.accelerate(model, graphs=True), torch.randn(2, 3, 20, 20, device="cuda")
    with torch.no_grad():
        for factor in (1, 2, -1):
            model[0].weight.mul_(factor)
            model[4].weight.data = model[4].weight * 0.5
            for _ in range(3):
                assert_near(fast(x), model(x), 1e-4)


def test_weights_are_not_laid_out_in_a_graph_of_the_callers():
    fast, x = fastcv.accelerate(small_model()), torch.randn(2, 3, 20, 20, device="cuda")
    with torch.no_grad():
        fast(x)
        expected = fast(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = fast(x)
        graph.replay()
        assert_near(result, expected, 1e-4)
        fast[0].weight.mul_(2)
        with pytest.raises(RuntimeError, match="call the model once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            fast(x)


def double(x, y):
    z = (x @ x).relu() + y  # with memory of its own
    return 2 * x, z, z.sum(0)


def assert_all_close(results, expected):
    for result, wanted in zip(results, expected, strict=True):
        assert_near(result, wanted, 1e-5)


def test_graphs_of_functions():
    graphs, kept = Graphs(double, most=2), []
    with torch.inference_mode():
        for n in (64, 128, 64, 256, 128, 64):  # one is dropped, and recorded again
            x, y = torch.randn(n, n, device="cuda"), torch.randn(n, device="cuda")
            kept.append((graphs(x, y), double(x, y)))
        graphs.clear()
        kept.append((graphs(x, y), double(x, y)))
    x = torch.ones(4, 4, device="cuda", requires_grad=True)
    graphs(x, torch.ones(4, device="cuda"))[1].sum().backward()
    assert x.grad is not None
    for results, expected in kept:
        assert_all_close(results, expected)


def test_graphs_of_several_threads():
    graphs = Graphs(double)
    inputs = [torch.randn(n, n, device="cuda") for n in (64, 256, 64, 1024) * 5]
    torch.cuda.synchronize()

    def run(x):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.inference_mode():
            results = [t.cpu() for t in graphs(x, x[0])]
        return results

    with ThreadPoolExecutor(4) as pool:
        for x, results in zip(inputs, pool.map(run, inputs), strict=True):
            assert_all_close(results, double(x, x[0]))


def test_graphs_inside_of_graphs():
    inner = Graphs(double)
    outer = Graphs(lambda x, y: inner(*inner(x, y)[1:]))
    x, y = torch.randn(64, 64, device="cuda"), torch.randn(64, device="cuda")
    with torch.no_grad():
        for _ in range(2):
            assert_all_close(outer(x, y), double(*double(x, y)[1:]))
    assert not inner._kept


def test_what_cannot_be_recorded_is_an_error():
    graphs, x, stream = (
        Graphs(lambda x: (x[: int(x.sum())],)),
        torch.ones(4, device="cuda"),
        torch.cuda.current_stream(),
    )
    with torch.no_grad(), pytest.raises(RuntimeError):
        graphs(x)
    assert torch.cuda.current_stream() == stream and not graphs._kept
    with torch.no_grad():
        assert Graphs(lambda x: (x + 1,))(x)[0].tolist() == [2] * 4
