"""Adaptive pooling and spatial pyramids: the heads of ResNet and VGG, PSPNet, SPPNet; forward and with gradients.

torch runs in both memory formats; the ratio is to the faster one, the table has both.
"""

import torch
import torch.nn.functional as F

from benchmarks.harness import as_test
from benchmarks.layouts import pooling_cases


def _pyramid(x, levels):
    return torch.cat([F.adaptive_max_pool2d(x, level).flatten(1) for level in levels], 1)


SHAPES = [  # operator, torch's function, name, size, output
    ("adaptive_avg_pool2d", F.adaptive_avg_pool2d, "ResNet-50 head, 1x2048x7x7 to 1", (1, 2048, 7, 7), 1),
    ("adaptive_avg_pool2d", F.adaptive_avg_pool2d, "ResNet-50 head, 32x2048x7x7 to 1", (32, 2048, 7, 7), 1),
    ("adaptive_avg_pool2d", F.adaptive_avg_pool2d, "VGG head, 1x512x14x14 to 7", (1, 512, 14, 14), 7),
    ("adaptive_avg_pool2d", F.adaptive_avg_pool2d, "PSPNet, 1x2048x60x60 to 6", (1, 2048, 60, 60), 6),
    ("adaptive_max_pool2d", F.adaptive_max_pool2d, "1x512x13x13 to 6", (1, 512, 13, 13), 6),
    ("spatial_pyramid_pool", _pyramid, "4, 2, 1 of 16x256x13x13", (16, 256, 13, 13), (4, 2, 1)),
]

CASES = pooling_cases(SHAPES)

test_adaptive_pool2d = as_test(CASES)
