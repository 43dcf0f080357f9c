"""fastcv.patch("torchvision"): who gets the kernels, equal results, nothing left after unpatch."""

import subprocess
import sys
import threading

import pytest
import torch

import fastcv

torchvision = pytest.importorskip("torchvision")
boxes_module = torchvision.ops.boxes

REGIONS = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")


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
    dumps = {
        name: torch._C._dispatch_dump(f"torchvision::{name}")
        for name in ("nms", *REGIONS, "deform_conv2d")
    }
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
        with pytest.raises(
            ValueError, match="package: expected one of 'torchvision', got 'detectron3'"
        ):
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
            assert torch.equal(
                torchvision.ops.nms(boxes.clone(), scores.clone(), threshold), expected
            )
        with torch.autocast("cpu"):
            assert torch.equal(torchvision.ops.nms(boxes, scores, threshold), expected)
        assert torch.equal(torchvision.ops.nms(boxes.requires_grad_(), scores, threshold), expected)


def test_torchscript():
    """The interpreter of TorchScript calls the dispatcher; scripting works in either state and
    survives the change."""

    def suppress(boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torchvision.ops.boxes.batched_nms(
            boxes, scores, torch.zeros_like(scores).long(), 0.5
        )

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
