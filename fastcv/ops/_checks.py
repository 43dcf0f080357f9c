"""Argument checks shared by the operators: each error names the argument, what was given and what was expected.

They read only shapes, types and devices, so they hold on fake tensors and cost little; checks of values (batch indices)
stand in the kernels.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")


def check_floating(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {value.dtype}")


def check_shape(name: str, value: Tensor, expected: tuple[int | str | None, ...]) -> None:
    """``expected`` has an int where the size is fixed and a letter (or None) where it is free."""
    shape = value.shape
    ok = len(shape) == len(expected)
    if ok:
        for have, want in zip(shape, expected, strict=True):  # a plain loop: all() would take a third of a small call
            if type(want) is not str and want is not None and have != want:
                ok = False
    if not ok:
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(value.shape)}")


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {value.device}")


def check_boxes_and_scores(boxes: Tensor, scores: Tensor) -> None:
    check_floating("boxes", boxes)
    check_floating("scores", scores)
    check_shape("boxes", boxes, ("N", 4))
    check_shape("scores", scores, (boxes.shape[0],))
    check_same_device("scores", scores, "boxes", boxes)


def check_threshold(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def check_groups(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 1:
        raise ValueError(f"groups: expected an int of at least 1, got {value!r}")


def as_int(value: object) -> int | torch.SymInt | None:
    """``value``, if it is an integer of any library, and None if it is not; truth values are none."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


_MOST = 2**31 - 1  # products of two such numbers do not overflow


def pair(name: str, value: int | tuple[int, ...] | list[int], minimum: int = 1) -> tuple[int, int]:
    """``value`` as two ints of at least ``minimum``, less than 2^31: one, alone or in a list as in torch, or a pair."""
    if type(value) is int and minimum <= value <= _MOST:  # the usual case
        return value, value
    given = value if isinstance(value, (list, tuple)) else (value,)
    both = [as_int(v) for v in (given if len(given) == 2 else (*given, *given))]
    if len(both) != 2 or any(v is None or v < minimum for v in both):
        raise ValueError(f"{name}: expected an int or a pair of ints of at least {minimum}, got {value!r}")
    if any(type(v) is int and v > _MOST for v in both):  # a symbol would be bound by the test
        raise ValueError(f"{name}: expected an int or a pair of ints of at most {_MOST}, got {value!r}")
    return tuple(both)


def class_ids(idxs: Tensor, shape: tuple[int, ...], boxes: Tensor) -> Tensor:
    """``idxs``, checked, with an integer type; floating ids become integers that are equal where they are."""
    check_tensor("idxs", idxs)
    check_shape("idxs", idxs, shape)
    check_same_device("idxs", idxs, "boxes", boxes)
    if idxs.is_complex():
        raise TypeError(f"idxs: expected an integer or floating type, got {idxs.dtype}")
    # Equal numbers have equal bit patterns once -0 is made 0.
    return (idxs.double() + 0.0).view(torch.int64) if idxs.is_floating_point() else idxs


def check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        wanted = " or ".join(f'"{a}"' for a in allowed)
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
