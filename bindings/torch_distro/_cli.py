"""The command ``torch-distro``: one subcommand a module, loaded when it is asked for.

A module of a command has ``add_arguments(parser)`` and ``run(arguments) -> int``, the exit status.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

import torch_distro

COMMANDS = {
    "doctor": (
        "torch_distro._doctor",
        "check this installation and environment, and say what to do about each finding",
    ),
    "bench": ("torch_distro._bench", "measure what an exchange costs"),
}
"""Name -> module, summary."""


def parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser; only the arguments of the command that `argv` names are loaded."""
    top = argparse.ArgumentParser(
        prog="torch-distro", description="Commands of torch-distro, a backend of torch.distributed."
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {torch_distro.__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary}.".capitalize())
        command.add_argument("--json", action="store_true", help="print JSON instead of text")
        if argv is None or name in argv:
            importlib.import_module(module).add_arguments(command)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process if not given.

    Returns:
        The exit status: 0, 1 where the command found something wrong; 2 (by SystemExit) for
        arguments that are not understood.
    """
    arguments = parser(argv).parse_args(argv)
    module, _ = COMMANDS[arguments.command]
    status: int = importlib.import_module(module).run(arguments)
    return status
