"""``fastcv.accelerate(model)``: somebody's model, on fastcv's kernels.

Every maximal part of the model that can be traced (no control flow that depends on data) is captured as a graph
(:mod:`_capture`), written as steps of a program (:mod:`_lower`, :mod:`_handlers`), shortened (:mod:`_passes`), and run
by ``csrc/program`` in one call, or on a CUDA device step by step (:mod:`_device`), on request as a graph
(:mod:`_graphs`). Parts that cannot be traced keep their Python, and their children are looked at one by
one. Detectors get fastcv's operators (:mod:`_detection`). What was done is in the report.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from .._library import cpu_loaded
from ._capture import capture
from ._detection import replace_operators
from ._detectors import WholeDetector, replay_detections, whole_detector
from ._program import Settings
from ._report import Report
from ._tune import load_tuning, tune

__all__ = ["Report", "WholeDetector", "accelerate", "load_tuning", "tune", "whole_detector"]


def accelerate(
    model: nn.Module,
    *,
    inplace: bool = False,
    dtype: torch.dtype = torch.float32,
    precision: str = "default",
    low_memory: bool = False,
    graphs: bool = False,
) -> nn.Module:
    """The same model for inference, faster on the CPU, and prepared for CUDA devices (where nothing is measured yet).

    On the CPU parts of it run as one call each. On a CUDA device norms are folded into weights, maps are channels-last,
    and bias, addition and activation go into convolutions. The inputs of each call decide: the model may be moved.

    Args:
        model: any module. Modules with hooks, and what cannot be traced, run as before.
        inplace: change ``model`` itself; otherwise it is left as it is, and the result shares its parameters. They may
            be changed (``load_state_dict``): what was prepared from them is made again at the next call.
        dtype: ``torch.bfloat16`` rounds the operands of matrix products to bfloat16 on processors that are faster so
            (AVX512-BF16): relative errors of about 1e-2 instead of 1e-6. Inputs, outputs and sums stay float32. On CUDA
            devices maps and laid out weights are ``torch.bfloat16`` or ``torch.float16`` (for models that are there),
            inside of the parts; their inputs, outputs and parameters stay float32, and so do sums. The rest of the
            model, and a model in float16 on the CPU, computes in float32.
        precision: of convolutions in float32 on the CPU; on CUDA devices torch's settings hold, which allow TF32.
            ``"default"``: relative errors of a layer at most 1e-5;
            ``"highest"``: no Winograd, errors as torch's; ``"fast"``: Winograd's largest tiles where they are faster,
            relative errors at most 5e-5. What that is relative to: see :func:`fastcv.ops.conv2d`.
        low_memory: lay most weights out at each call, in memory that layers share, instead of once. Otherwise they are
            there twice, those of 3x3 convolutions five times. The same results, slower: a tenth where maps are large
            (detectors, segmentation), half again as long and more for one image of 224 pixels. On the CPU only.
        graphs: on CUDA devices record each part as a CUDA graph at the first call with a size of inputs, and replay it
            at later ones, as one launch instead of one for each kernel. 16 sizes are kept, with memory for the largest.
            Detectors of torchvision (those of :func:`fastcv.whole_detector`) become one graph from the padded batch to
            the detections. Elsewhere it changes nothing.

    Returns:
        A module in evaluation mode with the same class, attributes, state dict and outputs (to rounding), and the
        attribute ``fastcv_report``, which prints what was changed, what was left, and why. Where a model unpools to the
        positions of maxima, rounding may choose another among those as good as equal, as it may in torch. While
        gradients are enabled or in training mode it runs as before.

    Raises:
        TypeError: ``model`` is not a module, ``low_memory`` or ``graphs`` is not a bool.
        ValueError: another ``dtype`` or ``precision``; float16 for a model on the CPU.

    Example:
        >>> import torch, fastcv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> fast = fastcv.accelerate(model)
        >>> with torch.inference_mode():
        ...     fast(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 8, 6, 6])
        >>> print(fast.fastcv_report)
        (the model): 1 program with 1 convolution, 2 layers fused
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    on_cuda = any(t.is_cuda for t in (*model.parameters(), *model.buffers()))
    if dtype not in (torch.float32, torch.bfloat16) and not (dtype == torch.float16 and on_cuda):
        why = ", which is for models on CUDA devices" if dtype == torch.float16 else ""
        raise ValueError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}{why}")
    if precision not in ("default", "highest", "fast") or (precision != "default" and dtype != torch.float32):
        raise ValueError(f'precision: expected "default", or in float32 "highest" or "fast", got {precision!r}')
    for name, value in (("low_memory", low_memory), ("graphs", graphs)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {value!r}")
    if not inplace:
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        model = copy.deepcopy(model, shared)
    model.eval()
    report = Report()
    if not (cpu_loaded or on_cuda):
        report.left.append(("", "for fastcv's compiled kernels are not there"))
        model.fastcv_report = report
        return model
    # torchvision's own code takes results in any memory format.
    keep_strides = not type(model).__module__.startswith("torchvision.")
    settings = Settings("bfloat16" if dtype == torch.bfloat16 else precision, low_memory, dtype, graphs)
    capture(model, "", report, keep_strides, settings)
    report.operators = replace_operators(model)
    if graphs and on_cuda:
        replay_detections(model, report)
    model.fastcv_report = report
    return model
