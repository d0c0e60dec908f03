"""The command ``torch-distro``: one subcommand a module, loaded when it is asked for.

A module of a command has ``add_arguments(parser)`` and ``run(arguments) -> int``, the exit status.
Some commands are programs of their own, which come with the package.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch_distro

COMMANDS = {
    "doctor": (
        "torch_distro._doctor",
        "check this installation and environment, and say what to do about each finding",
    ),
    "bench": ("torch_distro._bench", "measure what an exchange costs"),
}
"""Name -> module, summary."""

PROGRAMS = {
    "keygen": ("torch-distro-keygen", "make the keys of a group, or one's own"),
    "relay": (
        "torch-distro-relay",
        "pass messages on between ranks that dial it (DISTRO_TOPOLOGY=hub)",
    ),
}
"""Name -> program in the package's folder ``bin``, summary. It takes all arguments as they are."""


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
    for name, (_, summary) in PROGRAMS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return top


def program(name: str) -> Path:
    """Where a program of this package is.

    Raises:
        SystemExit: it is not there, which says how to get it.
    """
    path = Path(__file__).parent / "bin" / name
    if not os.access(path, os.X_OK):
        raise SystemExit(
            f"torch-distro: the program {name} is not in this installation ({path}): reinstall "
            "torch-distro, or, in a source tree, build the target of that name and put it there"
        )
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. One that is a program takes the place of this process.

    Args:
        argv: the arguments after the program's name; those of the process if not given.

    Returns:
        The exit status: 0, 1 where the command found something wrong; 2 (by SystemExit) for
        arguments that are not understood.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in PROGRAMS:
        path = program(PROGRAMS[words[0]][0])
        os.execv(path, [f"torch-distro {words[0]}", *words[1:]])
    arguments = parser(argv).parse_args(argv)
    module, _ = COMMANDS[arguments.command]
    status: int = importlib.import_module(module).run(arguments)
    return status
