"""Commands that are programs of their own: they run on hosts without Python and torch, too."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAMS = {
    "relay": (
        "torch-distro-relay",
        "pass frames on between ranks that dial it (DISTRO_TOPOLOGY=hub)",
    ),
}
"""Command -> program, summary."""

FOLDER = Path(__file__).parent / "bin"


def path_of(command: str) -> Path:
    """The program of a command.

    Raises:
        FileNotFoundError: this package was built without it.
    """
    program, _ = PROGRAMS[command]
    path = FOLDER / program
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: this package was not built whole; install torch-distro again"
        )
    return path


def run(command: str, arguments: Sequence[str]) -> int:
    """Become the program; returns only if that cannot be: 1."""
    try:
        path = path_of(command)
    except FileNotFoundError as error:
        print(f"torch-distro {command}: {error}", file=sys.stderr)
        return 1
    sys.stdout.flush()
    os.execv(path, [str(path), *arguments])
