"""``fastcv run``: any script, unchanged, on fastcv's operators."""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from .. import interop

PACKAGE = "torchvision"


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "run",
        help="run a Python script or module with torchvision patched",
        description="Run a Python script (or module, with -m) as python would, with torchvision's "
        "operators re-pointed at fastcv's. Processes that it spawns (not forks) start unpatched.",
        usage="fastcv run [-h] (SCRIPT | -m MODULE) [ARGUMENT ...]",
    )
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("script", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(parser=parser)
    return parser


def main(arguments: argparse.Namespace) -> int:
    """Runs it as ``__main__``; its exit status, or exception, is the command's."""
    as_module = arguments.module is not None
    words = arguments.module if as_module else arguments.script
    if not words:
        arguments.parser.error("expected a script, or -m and a module")
    target = words[0]
    if not as_module and not os.path.exists(target):
        arguments.parser.error(f"can't open file {target!r}: no such file or directory")
    interop.patch(PACKAGE)
    sys.argv = list(words)
    if as_module:
        sys.path[0] = os.getcwd()
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(target))
        runpy.run_path(target, run_name="__main__")
    return 0
