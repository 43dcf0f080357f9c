"""Memory over many images of random sizes, for each of which a plan is made."""

import subprocess
import sys
from pathlib import Path

import pytest

import fastcv

if fastcv.build_info()["operators"]["conv2d"]["cpu"] != "compiled":
    pytest.skip("the compiled part is not built", allow_module_level=True)
pytest.importorskip("torchvision")

CODE = """
import random, torch, torchvision, fastcv
from pathlib import Path

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

torch.manual_seed(0)
random.seed(0)
without = {"weights_backbone": None} if "rcnn" in NAME else {}
model = torchvision.models.get_model(NAME, weights=None, **without).eval()
model = fastcv.accelerate(model, OPTIONS)
with torch.inference_mode():
    for i in range(300):
        image = torch.rand(3, random.randint(100, 400), random.randint(100, 400))
        model([image] if "rcnn" in NAME else image[None])
        if i % 100 == 99:
            print(resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("options", ["", "low_memory=True"])
@pytest.mark.parametrize("name", ["resnet18", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_flat_over_300_images(name, options):
    """What the first 100 images needed is enough for the others, but for a tenth and 20 MB: sizes are random."""
    code = CODE.replace("NAME", repr(name)).replace("OPTIONS", options)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, third = map(float, run.stdout.split())
    print(name, options, first, second, third)
    assert max(second, third) <= 1.1 * first + 20
