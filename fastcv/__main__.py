"""The command line: ``python -m fastcv`` or ``fastcv``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .cli import compare, detect, info, run

COMMANDS = (info, run, detect, compare)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastcv", description="Fast kernels for PyTorch vision.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands).set_defaults(command=command.main)
    parsed = parser.parse_args(arguments)
    return parsed.command(parsed)


if __name__ == "__main__":
    sys.exit(main())
