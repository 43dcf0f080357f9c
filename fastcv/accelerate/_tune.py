"""``fastcv.tune``: kernels chosen by measurement."""

from __future__ import annotations

import json
import os
import statistics
import time

import torch
from torch import nn

from .. import ops
from .._files import replacing
from .._library import LIBRARY
from ..ops._convolution import calls
from ..ops.conv2d import KERNELS
from ._steps import OPS

LIBRARY.define(
    "conv2d_choose(int[] input, int[] weight, int groups, int[] stride, int[] padding, int[] dilation, "
    "str kernel) -> ()"
)
_INEXACT = "bf16", "amx", "winograd_6x6", "winograd_5x5_4x4"
_CANDIDATES = tuple(kernel for kernel in KERNELS if kernel != "torch" and kernel not in _INEXACT)
_GAIN = 0.97  # of the time of the model's choice: less is noise


def tune(model: nn.Module, *inputs, file: str | os.PathLike[str] | None = None, rounds: int = 9) -> list[dict]:
    """Measure the kernels that serve each convolution of an accelerated model, and use the fastest from now on.

    Without it a model of arithmetic and memory chooses; measuring finds what that gets wrong on a processor.

    Args:
        model: what :func:`fastcv.accelerate` returned.
        inputs: what it is called with. Choices hold for these sizes of maps, in this process, for all models.
        file: where to write the choices, as JSON, for :func:`fastcv.load_tuning` in other processes.
        rounds: timed runs of each kernel, by turns.

    Returns:
        the choices that differ from the model's: dictionaries with ``input``, ``weight``, ``groups``, ``stride``,
        ``padding``, ``dilation``, ``kernel``, and ``times_as_fast``.

    Raises:
        TypeError: ``model`` is not accelerated.

    Example:
        >>> import torch, fastcv
        >>> fast = fastcv.accelerate(torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU()))
        >>> choices = fastcv.tune(fast, torch.zeros(1, 8, 20, 20))
    """
    if not hasattr(model, "fastcv_report"):
        raise TypeError(f"model: expected what fastcv.accelerate returned, got {type(model).__name__}")
    choices = []
    with torch.inference_mode():
        model(*inputs)
        programs = [program for part in model.fastcv_report.parts for program in part.programs]
        for shape in _shapes(model, inputs, programs):
            choice = _fastest(shape, rounds)
            if choice is not None:
                choices.append(choice)
    _apply(choices)
    for program in programs:
        program.reload()
    if file is not None:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(choices, indent=1) + "\n")
    return choices


def load_tuning(file: str | os.PathLike[str]) -> list[dict]:
    """Use the choices that :func:`fastcv.tune` wrote; programs that were planned before keep theirs.

    Kernels are those that :func:`fastcv.tune` measures, or ``"auto"``, which undoes a choice.

    Raises:
        ValueError: the file holds something else; then none of it is used.
    """
    with open(file) as opened:
        try:
            choices = json.load(opened)
        except json.JSONDecodeError as error:
            raise ValueError(f"file: {os.fspath(file)} is not JSON: {error}") from None
    try:
        _check(choices)
        _apply(choices)
    except (ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"file: {os.fspath(file)} does not hold choices of fastcv.tune ({reason})") from None
    return choices


_NUMBERS = {"input": 4, "weight": 4, "stride": 2, "padding": 2, "dilation": 2}
_in_force: dict[tuple, str] = {}


def _check(choices: object) -> None:
    if not isinstance(choices, list):
        raise ValueError(f"expected a list, got {type(choices).__name__}")
    for i, c in enumerate(choices):
        if not isinstance(c, dict):
            raise ValueError(f"choice {i}: expected a dictionary, got {c!r}")
        for name, count in _NUMBERS.items():
            numbers = c.get(name)
            if not isinstance(numbers, list) or len(numbers) != count or not all(map(_is_number, numbers)):
                raise ValueError(f"choice {i}: {name}: expected {count} ints of 0 to 2^31 - 1, got {numbers!r}")
        if not _is_number(c.get("groups")):
            raise ValueError(f"choice {i}: groups: expected an int, got {c.get('groups')!r}")
        if c.get("kernel") not in (*_CANDIDATES, "auto"):
            raise ValueError(f"choice {i}: kernel: expected one of {', '.join(_CANDIDATES)}, got {c.get('kernel')!r}")


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _apply(choices: list[dict]) -> None:
    """All of them, or none where a kernel does not serve its shape."""
    before = dict(_in_force)
    try:
        for c in choices:
            shape = (c["input"], c["weight"], c["groups"], c["stride"], c["padding"], c["dilation"])
            torch.ops.fastcv.conv2d_choose(*shape, c["kernel"])
            _in_force[_key(shape)] = c["kernel"]
    except RuntimeError:
        for key in _in_force:
            torch.ops.fastcv.conv2d_choose(*key, before.get(key, "auto"))
        _in_force.clear()
        _in_force.update(before)
        raise
    finally:
        calls.clear()  # the choices they made


def _key(shape) -> tuple:
    return tuple(tuple(part) if isinstance(part, list) else part for part in shape)


def _shapes(model: nn.Module, inputs, programs) -> list[dict]:
    """Of the convolutions that a call runs, each once."""
    calls: list[tuple] = []
    handles = [p.register_forward_pre_hook(lambda p, inputs: calls.append((p, inputs))) for p in programs]
    model(*inputs)
    for handle in handles:
        handle.remove()
    shapes = {}
    for program, values in calls:
        for row in program.profile(*values, repeat=1).tolist():
            op, _, _, _, _, n, c, h, w, k, _, _, kh, kw, *geometry, groups, normed, _ = row
            if op != OPS.index("conv") or normed or h * w == 1:
                continue
            pairs = [geometry[i : i + 2] for i in range(0, 6, 2)]
            key = dict(zip(("stride", "padding", "dilation"), pairs, strict=True), groups=groups)
            shapes[str((n, c, h, w, k, kh, kw, key))] = {
                "input": [n, c, h, w],
                "weight": [k, c // groups, kh, kw],
                **key,
            }
    return list(shapes.values())


def _fastest(shape: dict, rounds: int) -> dict | None:
    """The kernel that is clearly faster than the one that "auto" stands for."""
    x = torch.randn(shape["input"]).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(shape["weight"])
    geometry = (shape["stride"], shape["padding"], shape["dilation"], shape["groups"])
    two = [shape["groups"], shape["stride"], shape["padding"], shape["dilation"]]
    auto = KERNELS[torch.ops.fastcv.conv2d_kernel(x, weight, *two)]
    times: dict[str, list[float]] = {}
    for kernel in _CANDIDATES:
        try:
            ops.conv2d(x, weight, None, *geometry, kernel=kernel)
            times[kernel] = []
        except RuntimeError:  # it does not serve this shape
            continue
    for _ in range(rounds):
        for kernel, kept in times.items():
            start = time.perf_counter()
            ops.conv2d(x, weight, None, *geometry, kernel=kernel)
            kept.append(time.perf_counter() - start)
    medians = {kernel: statistics.median(kept) for kernel, kept in times.items()}
    best = min(medians, key=medians.get)
    if medians[best] > _GAIN * medians[auto]:
        return None
    return {**shape, "kernel": best, "times_as_fast": medians[auto] / medians[best]}
