"""fastcv.patch("torchvision"): who gets the kernels, equal results, nothing left after unpatch."""

import copy
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastcv
from fastcv.demo.detector import same_detections

torchvision = pytest.importorskip("torchvision")
boxes_module = torchvision.ops.boxes


def region_arguments(name, **options):
    """Arguments of one of the operators with gradients: input first."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 20, 24, generator=generator, **options)
    if name == "deform_conv2d":
        weight = torch.randn(5, 12, 3, 3, generator=generator, **options)
        offset = torch.randn(2, 18, 20, 24, generator=generator, **options)
        mask = torch.rand(2, 9, 20, 24, generator=generator, **options)
        return x, offset, weight, None, 1, 1, 1, mask
    rows = [[0, 1.0, 2, 35, 24], [1, 6, 6, 40, 38], [1, 0, 0, 10, 39], [0, -5, 7, 60, 20]]
    rois = torch.tensor(rows, **options)
    if name == "ps_roi_pool":  # at the last row and column torchvision's gradient is not that of its output
        rois = rois.clamp(max=37)
    return x, rois, (2, 3), 0.5, *((2,) if name.endswith("align") else ())


class Recorder(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name)
        return function(*args, **(kwargs or {}))


REGIONS = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")


def random_boxes(n, seed=0, size=100.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * size
    boxes = torch.cat([corner, corner + 1 + torch.rand(n, 2, generator=generator) * 30], 1)
    return boxes, torch.rand(n, generator=generator)


# Torchvision keeps the box whose score is NaN, fastcv never does: this shows who answers.
PROBE = (
    torch.tensor([[0.0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9], [60, 0, 69, 9]]),
    torch.tensor([float("nan"), 0.9, 0.8, 0.7]),
)


def probe_nms():
    return torchvision.ops.nms(*PROBE, 0.5).tolist()


TORCHVISION_ANSWER, FASTCV_ANSWER = [0, 1, 2, 3], [1, 2, 3]


def test_hand_computed_example():
    """Equal boxes of two classes left of the origin: torchvision shifts one onto the other."""
    boxes = torch.tensor([[-10.0, -10, -1, -1], [-10, -10, -1, -1]])
    arguments = (boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), 0.5)
    assert torchvision.ops.batched_nms(*arguments).tolist() == [0]
    with fastcv.patched("torchvision"):
        assert torchvision.ops.batched_nms(*arguments).tolist() == [0, 1]
    assert torchvision.ops.batched_nms(*arguments).tolist() == [0]


def test_patch_is_idempotent_and_reversible():
    dumps = {name: torch._C._dispatch_dump(f"torchvision::{name}") for name in ("nms", *REGIONS)}
    code = boxes_module.batched_nms.__code__
    assert probe_nms() == TORCHVISION_ANSWER
    assert fastcv.patch("torchvision") is None
    fastcv.patch("torchvision")
    assert probe_nms() == FASTCV_ANSWER
    assert "nms (cpu)" in fastcv.build_info()["patched"]["torchvision"]["operators"]
    fastcv.unpatch("torchvision")
    assert probe_nms() == TORCHVISION_ANSWER
    fastcv.unpatch("torchvision")
    assert probe_nms() == TORCHVISION_ANSWER
    assert fastcv.build_info()["patched"] == {}
    assert boxes_module.batched_nms.__code__ is code
    for name, dump in dumps.items():
        assert torch._C._dispatch_dump(f"torchvision::{name}") == dump, name


def test_blocks_nest_and_mix_with_patch():
    with fastcv.patched("torchvision"):
        with fastcv.patched("torchvision"):
            assert probe_nms() == FASTCV_ANSWER
        assert probe_nms() == FASTCV_ANSWER
        fastcv.patch("torchvision")
    assert probe_nms() == FASTCV_ANSWER  # patch() outlives the block
    with fastcv.patched("torchvision"):
        fastcv.unpatch("torchvision")
        assert probe_nms() == FASTCV_ANSWER  # the block outlives unpatch()
    assert probe_nms() == TORCHVISION_ANSWER


def test_block_ends_with_an_exception():
    with pytest.raises(KeyError), fastcv.patched("torchvision"):
        raise KeyError
    assert probe_nms() == TORCHVISION_ANSWER


def test_blocks_of_several_threads():
    inside, leave = threading.Barrier(3), threading.Event()
    answers = []

    def work():
        with fastcv.patched("torchvision"):
            inside.wait(10)
            leave.wait(10)
            answers.append(probe_nms())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait(10)
    assert probe_nms() == FASTCV_ANSWER
    leave.set()
    for thread in threads:
        thread.join()
    assert answers == [FASTCV_ANSWER] * 2
    assert probe_nms() == TORCHVISION_ANSWER


def test_unknown_package():
    for call in (fastcv.patch, fastcv.unpatch, lambda name: fastcv.patched(name).__enter__()):
        with pytest.raises(ValueError, match="package: expected one of 'torchvision', got 'detectron3'"):
            call("detectron3")


def test_without_torchvision():
    """An ImportError with the command, and nothing half done."""
    script = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import fastcv\n"
        "try: fastcv.patch('torchvision')\n"
        "except ImportError as error: print(error)\n"
        "print(fastcv.build_info()['patched'])"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pip install torchvision" in result.stdout
    assert result.stdout.splitlines()[-1] == "{}"
    assert "Traceback" not in result.stderr


def test_patch_warns_of_nothing(recwarn):
    with fastcv.patched("torchvision"):
        probe_nms()
    assert [str(w.message) for w in recwarn if "eprecat" not in str(w.message)] == []


def test_every_holder_of_batched_nms():
    """Those who imported the function by name before the patch are served too."""
    held = boxes_module.batched_nms
    boxes = torch.tensor([[-10.0, -10, -1, -1], [-10, -10, -1, -1]])
    scores, classes = torch.tensor([0.9, 0.8]), torch.tensor([0, 1])
    with fastcv.patched("torchvision"):
        by_keyword = held(boxes=boxes, scores=scores, idxs=classes, iou_threshold=0.5)
        assert by_keyword.tolist() == held(boxes, scores, classes, 0.5).tolist() == [0, 1]
    assert held(boxes, scores, classes, 0.5).tolist() == [0]


@pytest.mark.parametrize("n", [0, 1, 100, 3000])
def test_batched_nms_agrees(n):
    boxes, scores = random_boxes(n)
    classes = torch.arange(n) % 7
    expected = torchvision.ops.batched_nms(boxes, scores, classes, 0.5)
    with fastcv.patched("torchvision"):
        actual = torchvision.ops.batched_nms(boxes, scores, classes, 0.5)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9])
def test_nms_agrees(threshold):
    boxes, scores = random_boxes(500)
    expected = torchvision.ops.nms(boxes, scores, threshold)
    with fastcv.patched("torchvision"):
        assert torch.equal(torchvision.ops.nms(boxes, scores, threshold), expected)
        assert torch.equal(torch.ops.torchvision.nms(boxes, scores, threshold), expected)
        with torch.inference_mode():
            assert torch.equal(torchvision.ops.nms(boxes.clone(), scores.clone(), threshold), expected)
        with torch.autocast("cpu"):
            assert torch.equal(torchvision.ops.nms(boxes, scores, threshold), expected)
        assert torch.equal(torchvision.ops.nms(boxes.requires_grad_(), scores, threshold), expected)


def test_torchscript():
    """The interpreter of TorchScript calls the dispatcher; scripting works in either state and
    survives the change."""

    def suppress(boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torchvision.ops.boxes.batched_nms(boxes, scores, torch.zeros_like(scores).long(), 0.5)

    scripted = torch.jit.script(suppress)
    with fastcv.patched("torchvision"):
        scripted_patched = torch.jit.script(boxes_module.batched_nms)
        boxes, scores = random_boxes(50)
        expected = boxes_module.batched_nms(boxes, scores, torch.zeros(50).long(), 0.5)
        assert torch.equal(scripted(boxes, scores), expected)
        assert torch.equal(scripted_patched(boxes, scores, torch.zeros(50).long(), 0.5), expected)
    assert torch.equal(scripted(boxes, scores), expected)
    assert torch.equal(scripted_patched(boxes, scores, torch.zeros(50).long(), 0.5), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compiled_functions_follow():
    """Compiled before the patch, under it or after it: a function gives what its eager form gives
    at that moment."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def suppress(boxes, scores):
        return torchvision.ops.nms(boxes, scores, 0.5) + 0

    @torch.compile(fullgraph=True, backend="aot_eager")
    def suppress_by_class(boxes, scores, classes):
        return torchvision.ops.boxes.batched_nms(boxes, scores, classes, 0.5) + 0

    boxes = torch.tensor([[-10.0, -10, -1, -1], [-10, -10, -1, -1], [-40, -40, -30, -30]])
    by_class = (boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0]))
    for _ in range(2):
        assert suppress(*PROBE).tolist() == TORCHVISION_ANSWER
        assert suppress_by_class(*by_class).tolist() == [0, 2]
        with fastcv.patched("torchvision"):
            assert suppress(*PROBE).tolist() == FASTCV_ANSWER
            assert suppress_by_class(*by_class).tolist() == [0, 1, 2]
            with torch.inference_mode():
                assert suppress(*PROBE).tolist() == FASTCV_ANSWER


def test_errors_stay_errors():
    with fastcv.patched("torchvision"):
        with pytest.raises(RuntimeError, match="boxes"):
            torchvision.ops.nms(torch.rand(3, 5), torch.rand(3), 0.5)
        with pytest.raises(ValueError, match="scores"):
            torchvision.ops.batched_nms(torch.rand(3, 4), torch.rand(2), torch.zeros(3).long(), 0.5)


# ---- the operators with gradients ----------------------------------------------------------------


def test_all_are_patched():
    with fastcv.patched("torchvision"):
        report = fastcv.build_info()["patched"]["torchvision"]["operators"]
    assert report == [f"{name} (cpu)" for name in ("nms", *REGIONS)]


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_results_and_gradients_agree(name, memory_format):
    function = getattr(torchvision.ops, name)
    x, *rest = region_arguments(name)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    expected = function(x, *rest)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    with fastcv.patched("torchvision"):
        with Recorder() as recorder:
            actual = function(x, *rest)
            (gradient,) = torch.autograd.grad(actual.square().sum(), x)
        assert recorder.names >= {f"fastcv::{name}", f"fastcv::{name}_backward"}
        assert not any("torchvision" in called for called in recorder.names)
        assert actual.is_contiguous()  # as torchvision's, so that .view() works
        with torch.inference_mode():
            assert torch.equal(function(x, *rest), actual)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)
    with Recorder() as recorder:
        function(x, *rest)
    assert not any("fastcv" in called for called in recorder.names)


@pytest.mark.parametrize("name", REGIONS)
def test_second_derivatives_and_forward_mode(name):
    """torchvision raises for the first and gives zero for the second."""
    function = getattr(torchvision.ops, name)
    x, *rest = region_arguments(name, dtype=torch.float64)
    x.requires_grad_()
    direction = torch.randn_like(x)
    with fastcv.patched("torchvision"):
        output = function(x, *rest)
        (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((gradient * direction).sum(), x)
        _, tangent = torch.func.jvp(lambda x: function(x, *rest), (x.detach(),), (direction,))
        step = 1e-6
        change = function(x + step * direction, *rest) - function(x - step * direction, *rest)
    assert second.abs().max() > 0
    torch.testing.assert_close(tangent, change / (2 * step), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", REGIONS)
def test_autocast_and_mixed_types(name):
    """Half-precision features beside float32 boxes: torchvision raises."""
    function = getattr(torchvision.ops, name)
    x, *rest = region_arguments(name)
    expected = function(x, *rest)
    with fastcv.patched("torchvision"), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = function(x.bfloat16(), *rest)
    assert actual.dtype == torch.bfloat16
    scale = expected.abs().max()
    torch.testing.assert_close(actual.float() / scale, expected / scale, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compiled_regions(name):
    """A graph made before the patch stays right under it and after it, with channels-last input."""
    function = getattr(torchvision.ops, name)
    x, *rest = region_arguments(name)
    x = x.contiguous(memory_format=torch.channels_last)
    expected = function(x, *rest) + 1

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x):
        return function(x, *rest) + 1

    for _ in range(2):
        for run in (compiled, torch.no_grad()(compiled), torch.inference_mode()(compiled)):
            torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-4)
            with fastcv.patched("torchvision"):
                actual = run(x)
                assert actual.is_contiguous()
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    with fastcv.patched("torchvision"):
        (gradient,) = torch.autograd.grad(compiled(x.requires_grad_()).sum(), x)
        (eager,) = torch.autograd.grad(function(x, *rest).sum(), x)
    torch.testing.assert_close(gradient, eager, rtol=1e-4, atol=1e-4)


def test_exported_programs_hold_torchvision_operators():
    """What is exported under the patch runs where fastcv is not installed."""

    class Pool(torch.nn.Module):
        def forward(self, x, rois):
            return torchvision.ops.roi_align(x, rois, 2)

    arguments = region_arguments("roi_align")[:2]
    with fastcv.patched("torchvision"):
        program = torch.export.export(Pool(), arguments).run_decompositions()
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "torchvision.roi_align.default" in targets
    assert not any("fastcv" in target for target in targets)


@pytest.mark.parametrize("name", REGIONS)
def test_vmap(name):
    function = getattr(torchvision.ops, name)
    x, *rest = region_arguments(name)
    stack = torch.stack([x, 2 * x, -x])
    expected = torch.stack([function(each, *rest) for each in stack])
    with fastcv.patched("torchvision"):
        actual = torch.vmap(lambda x: function(x, *rest))(stack)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# ---- the pooler of feature pyramids --------------------------------------------------------------


def pyramid(names=("0", "1", "2", "3"), **options):
    generator = torch.Generator().manual_seed(0)
    strides = {"0": 4, "1": 8, "2": 16, "3": 32}
    maps = {name: torch.randn(2, 6, 256 // strides[name], 320 // strides[name], generator=generator) for name in names}
    maps = {name: value.to(**options) for name, value in maps.items()}
    return maps, [random_boxes(40, seed, 200.0)[0] * 1.3 for seed in (1, 2)], [(256, 320)] * 2


@pytest.mark.parametrize("options", [{}, {"memory_format": torch.channels_last}])
def test_multiscale_roi_align_agrees(options):
    pool = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    arguments = pyramid(**options)
    expected = pool(*arguments)
    with fastcv.patched("torchvision"):
        with Recorder() as recorder:
            actual = pool(*arguments)
        scripted = torch.jit.script(pool)
        compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(scripted(*arguments), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled(*arguments), expected, rtol=1e-4, atol=1e-4)
    assert "fastcv::multiscale_roi_align" in recorder.names
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(pool(*arguments), expected)
    assert torch.equal(scripted(*arguments), expected)


def test_multiscale_roi_align_leaves_the_unusual_to_torchvision():
    """A single map, levels left out, and maps of several types give what they give unpatched."""
    cases = []
    for names in (["1"], ["0", "3"], ["0", "1", "2"]):
        pool = torchvision.ops.MultiScaleRoIAlign(names, 7, 2)
        cases.append((pool, pyramid(names)))
    maps, boxes, sizes = pyramid()
    maps["0"] = maps["0"].double()
    boxes = [b.double() for b in boxes]
    pool = torchvision.ops.MultiScaleRoIAlign(["0"], 7, 2)
    cases.append((pool, (maps, boxes, sizes)))
    for pool, arguments in cases:
        expected = pool(*arguments)
        with fastcv.patched("torchvision"):
            actual = pool(*arguments)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_multiscale_roi_align_of_maps_of_several_types():
    """As autocast leaves them; torchvision raises for half-precision maps beside float32 boxes."""
    maps, boxes, sizes = pyramid()
    pool = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    expected = pool(maps, boxes, sizes)
    maps["1"] = maps["1"].bfloat16()
    with fastcv.patched("torchvision"):
        actual = pool(maps, boxes, sizes)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


# ---- whole models --------------------------------------------------------------------------------


def test_detector_gives_the_same():
    """torchvision's Faster R-CNN, in training (losses and gradients) and inference."""
    torch.manual_seed(0)
    detection = torchvision.models.detection
    backbone = detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    model = detection.FasterRCNN(backbone, num_classes=3, min_size=96, max_size=160, box_score_thresh=0.0)
    image = torch.rand(3, 200, 260)
    boxes = torch.tensor([[10.0, 10, 90, 90], [30, 40, 220, 150]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}

    def step():
        torch.manual_seed(1)
        own = copy.deepcopy(model).train()
        losses = own([image], [target])
        sum(losses.values()).backward()
        gradient = own.backbone.fpn.inner_blocks[0][0].weight.grad
        with torch.inference_mode():
            (found,) = own.eval()([image])
        return {key: value.detach() for key, value in losses.items()}, gradient, found

    losses, gradient, found = step()
    with fastcv.patched("torchvision"), Recorder() as recorder:
        patched_losses, patched_gradient, patched_found = step()
    names = {"fastcv::batched_nms", "fastcv::multiscale_roi_align_backward"}
    assert recorder.names >= names
    torch.testing.assert_close(patched_losses, losses, rtol=1e-3, atol=1e-4)
    scale = gradient.abs().max()
    torch.testing.assert_close(patched_gradient / scale, gradient / scale, rtol=0, atol=1e-3)
    assert len(found["boxes"]) > 10
    same_detections(patched_found, found)
