"""avg_pool2d: Inception and DenseNet, forward and with gradients.

torch runs in both memory formats; the ratio is to the faster one, the table has both.
"""

import torch.nn.functional as F

from benchmarks.harness import as_test
from benchmarks.layouts import pooling_cases

SHAPES = [  # operator, torch's function, name, size, kernel, stride, padding
    ("avg_pool2d", F.avg_pool2d, "Inception 3x3/1, 1x480x14x14", (1, 480, 14, 14), 3, 1, 1),
    ("avg_pool2d", F.avg_pool2d, "Inception v3 3x3/1, 8x192x35x35", (8, 192, 35, 35), 3, 1, 1),
    ("avg_pool2d", F.avg_pool2d, "DenseNet 2x2, 1x128x56x56", (1, 128, 56, 56), 2),
    ("avg_pool2d", F.avg_pool2d, "DenseNet 2x2, 16x128x56x56", (16, 128, 56, 56), 2),
    ("avg_pool2d", F.avg_pool2d, "2x2, 1x8x8x8", (1, 8, 8, 8), 2),
]

CASES = pooling_cases(SHAPES)

test_avg_pool2d = as_test(CASES)
