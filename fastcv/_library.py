"""Loads the compiled libraries and owns the operator namespace ``fastcv::``.

Importing never fails. Every operator has a reference implementation in plain PyTorch, registered for all devices; a
compiled kernel, where its library loaded, takes precedence on its device, and on CUDA devices one in Triton where
there is no compiled one. What is live is reported by :func:`build_info` and ``python -m fastcv info``; a missing CPU
library warns once, with the command that mends it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from ._plan import planned

PACKAGE = Path(__file__).resolve().parent
LIBRARY = torch.library.Library("fastcv", "DEF")
OPERATORS: dict[str, Callable | None] = {}
"""Name of each operator -> its reference implementation (None where there is none)."""

TRITON: dict[str, str] = {}
"""Name of each operator with a kernel in Triton -> its module in :mod:`fastcv.triton_kernels`."""

PATCHED: dict[str, dict[str, list[str]]] = {}
"""Package -> what of it is re-pointed; kept by ``fastcv.interop``."""

_load_errors: dict[str, str] = {}
_from_triton: dict[str, str] = {}
"""Name of each operator that Triton serves on CUDA devices -> what :func:`implementation` says of it."""

TRITON_WANTED = os.environ.get("FASTCV_TRITON", "")
if TRITON_WANTED not in ("", "all", "plan"):
    warnings.warn(f'FASTCV_TRITON: expected "all", "plan" or nothing, got {TRITON_WANTED!r}', RuntimeWarning, 2)


def mend_command() -> str:
    """The command that builds (or rebuilds) the compiled part of this installation."""
    root = PACKAGE.parent
    target = f"-e {root}" if (root / "setup.py").exists() else "--force-reinstall fastcv-kernels"
    return f"pip install --no-build-isolation {target}"


def _load(stem: str) -> bool:
    path = PACKAGE / f"{stem}.so"
    if not path.exists():
        _load_errors[stem] = "not built"
        return False
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        _load_errors[stem] = str(error.__cause__ or error).splitlines()[0]
        return False
    return True


cpu_loaded = _load("_C_cpu")
cuda_loaded = torch.version.cuda is not None and _load("_C_cuda")
try:
    from . import _host as host
except ImportError as error:
    host = None
    _load_errors["_host"] = str(error)

if not cpu_loaded:
    warnings.warn(
        f"fastcv's compiled kernels are not in use ({_load_errors['_C_cpu']}): every operator runs on the slow "
        f"pure-PyTorch reference path. To mend this, run: {mend_command()}",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def _warn_reference(name: str, device: str) -> None:
    warnings.warn(
        f"fastcv::{name} has no kernel for {device} tensors and runs on the slow pure-PyTorch reference path",
        RuntimeWarning,
        stacklevel=4,
    )


def define(
    schema: str,
    reference: Callable | None,
    *,
    triton: bool = False,
    torch_has_kernel: bool = False,
    timed: bool = True,
    triton_before_compiled: bool = False,
) -> str:
    """Define ``fastcv::<schema>`` with its reference implementation; returns the operator's name.

    The reference is registered for every device and used wherever no kernel is. ``triton``: the module of
    :mod:`fastcv.triton_kernels` with the reference's name has a kernel for CUDA devices, used where no compiled one is.
    ``torch_has_kernel``: on those the reference is a kernel of torch's (cuDNN's, say) and not slow. Then Triton's is
    used where ``FASTCV_TRITON=all`` asks for it, or with ``FASTCV_TRITON=plan`` where it was measured to be faster
    (:mod:`fastcv._plan`), but for an operator that is not ``timed`` as it only serves another's kernel.
    ``triton_before_compiled``: the same between Triton's and a compiled kernel.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    OPERATORS[name] = reference
    if reference is not None:

        @functools.wraps(reference)
        def run(*args, **kwargs):
            device = _device_of(args)
            if device != "cpu" and not torch_has_kernel and not torch.compiler.is_compiling():
                _warn_reference(name, device)
            return reference(*args, **kwargs)

        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        if triton:
            TRITON[name] = reference.__module__.rpartition(".")[2]
            compiled = _has_kernel(name, "CUDA")
            if importlib.util.find_spec("triton") and (triton_before_compiled or not compiled):
                other = _compiled_kernel(name) if compiled else reference if torch_has_kernel else None
                _register_triton(name, other, timed)
    return name


def _register_triton(name: str, other: Callable | None, timed: bool) -> None:
    """``other``: a kernel that serves CUDA devices as well, and does where nothing is asked for."""
    if other is not None and TRITON_WANTED not in ("all", "plan"):
        return
    by_plan = other is not None and timed and TRITON_WANTED == "plan"
    kernel = triton_kernel(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it takes the place of a compiled one, as it should
        LIBRARY.impl(name, planned(name, kernel, other) if by_plan else kernel, "CUDA", allow_override=True)
    _from_triton[name] = "plan" if by_plan else "triton"


def _compiled_kernel(name: str) -> Callable:
    """That of CUDA devices, also after another took its place."""
    kernel = torch.library.get_kernel(f"fastcv::{name}", "CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return lambda *args: kernel.call_boxed(keys, *args)


def triton_kernel(name: str) -> Callable:
    """The Triton implementation of ``fastcv::name``, imported when first called: triton takes a second."""
    module = f"{__package__}.triton_kernels.{TRITON[name]}"

    @functools.cache
    def launcher() -> Callable:
        return getattr(importlib.import_module(module), name)

    def run(*args, **kwargs):
        return launcher()(*args, **kwargs)

    return run


def _device_of(args) -> str:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device.type
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], torch.Tensor):
            return arg[0].device.type
    return "cpu"


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastcv::{name}", key)


def implementation(name: str, device: str) -> str:
    """What runs ``fastcv::name`` on ``"cpu"`` or ``"cuda"``: ``"compiled"``, ``"triton"``, ``"plan"`` (Triton's or
    torch's, as measured), ``"reference"`` or ``"none"``."""
    if device == "cuda" and name in _from_triton:
        return _from_triton[name]
    if _has_kernel(name, device.upper()):
        return "compiled"
    return "reference" if OPERATORS.get(name) is not None else "none"


def build_info() -> dict:
    """What was built and loaded, and what runs where.

    Returns:
        dict with ``torch`` (version), ``libraries`` (name -> ``"loaded"`` or the reason why not), ``cpu_isa`` (the
        instruction set in use, None without the compiled part), ``available_isas``, ``bfloat16_products`` (``"amx"``,
        ``"avx512_bf16"`` or ``"none"``: what the processor has for them), ``compiler``, ``threads``,
        ``operators`` (name -> {"cpu": ..., "cuda": ...}, each as :func:`implementation` has it) and
        ``patched`` (package -> what of it :func:`fastcv.patch` has re-pointed).

    Example:
        >>> import fastcv
        >>> sorted(fastcv.build_info()["operators"]["nms"])
        ['cpu', 'cuda']
    """
    if torch.version.cuda is None:
        _load_errors.setdefault("_C_cuda", "this torch has no CUDA")
    return {
        "torch": torch.__version__,
        "libraries": {stem: _load_errors.get(stem, "loaded") for stem in ("_C_cpu", "_C_cuda", "_host")},
        "cpu_isa": host.cpu_isa() if host and cpu_loaded else None,
        "available_isas": host.available_isas() if host else [],
        "bfloat16_products": host.bfloat16_products() if host else "none",
        "compiler": host.compiler() if host else None,
        "threads": torch.get_num_threads(),
        "operators": {
            name: {device: implementation(name, device) for device in ("cpu", "cuda")} for name in sorted(OPERATORS)
        },
        "patched": {package: dict(report) for package, report in PATCHED.items()},
    }
