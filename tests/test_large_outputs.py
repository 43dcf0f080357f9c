"""Outputs of many megabytes: their memory is kept for the next ones, and some are written past the caches."""

import subprocess
import sys

import pytest
import torch

import fastcv
from fastcv._library import implementation

pytestmark = pytest.mark.skipif(
    implementation("roi_align", "cpu") != "compiled", reason="the compiled kernels' memory; the reference uses torch's"
)


def case(seed, regions=700, channels=130):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, channels, 12, 15, generator=generator)
    corners = torch.rand(regions, 2, 2, generator=generator) * 16 - 2
    boxes = torch.cat([torch.zeros(regions, 1), corners.amin(1), corners.amax(1)], 1)
    return x, boxes


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [128, 130])
def test_same_as_many_small_outputs(memory_format, channels):
    x, boxes = case(0, channels=channels)
    x = x.contiguous(memory_format=memory_format)
    whole = fastcv.ops.roi_align(x, boxes, 7)
    assert whole.numel() * 4 >= 16 << 20
    assert whole.is_contiguous(memory_format=memory_format)
    parts = [fastcv.ops.roi_align(x, part, 7) for part in boxes.split(50)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels", [128, 130])
def test_roi_pool_too(dtype, channels):
    x, boxes = case(0, regions=1400, channels=channels)
    whole, argmax = torch.ops.fastcv.roi_pool(x.to(dtype), boxes, 1.0, 7, 7)
    assert whole.numel() * whole.element_size() >= 16 << 20
    parts = [torch.ops.fastcv.roi_pool(x.to(dtype), part, 1.0, 7, 7) for part in boxes.split(50)]
    assert torch.equal(whole, torch.cat([p[0] for p in parts]))
    assert torch.equal(argmax, torch.cat([p[1] for p in parts]))


def test_live_outputs_share_nothing_and_freed_ones_are_reused():
    first, second = (fastcv.ops.roi_align(*case(seed), 7) for seed in (1, 2))
    copy, place = first.clone(), first.data_ptr()
    view = first[5:]
    del first  # the view still holds the memory
    third = fastcv.ops.roi_align(*case(3), 7)
    assert torch.equal(view, copy[5:])
    assert len({place, second.data_ptr(), third.data_ptr()}) == 3
    del view
    assert fastcv.ops.roi_align(*case(1), 7).data_ptr() == place


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_more_is_kept_than_asked_for():
    program = """
import torch, fastcv
x, boxes = torch.randn(1, 256, 12, 15), torch.tensor([[0.0, 1, 1, 9, 9]]).repeat(700, 1)
kept = [fastcv.ops.roi_align(x, boxes, 7) for _ in range(12)]  # 35 MB each
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
full = resident()
del kept
print(full - resident())
"""
    freed = {}
    for megabytes in ("0", "128"):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={"FASTCV_MEMORY_CACHE": megabytes, "PATH": "", "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        freed[megabytes] = int(run.stdout)
    assert freed["0"] > 380
    assert 260 < freed["128"] < 330
