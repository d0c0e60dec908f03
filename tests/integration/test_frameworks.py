"""Every script of integration/frameworks, by the command that prints the matrix."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

INTEGRATION = Path(__file__).resolve().parents[2] / "integration"
sys.path.insert(0, str(INTEGRATION))

from matrix import losses_of  # noqa: E402
from rows import ROWS, Row  # noqa: E402

# What takes long and shows little more is left to the whole matrix: one row by torchrun (its ranks
# cannot be forked), one that compiles (by a compiler that does not optimise), some on four ranks.
LEFT_OUT = (
    "DDP, names nccl",
    "DDP(torch.compile)",
    "FSDP1, hybrid",
    "DDP, two sites",
    "FSDP1 over two sites",
)
COMPILER = "aot_eager"
RUNS = {
    "auto": [row for row in ROWS if row.name not in LEFT_OUT],
    # The others equal gloo in the default mode, or reach the backend by the same calls as these.
    "dense": [row for row in ROWS if row.name in ("DDP", "ImageNet-like", "nanoGPT-like")],
    "ef": [row for row in ROWS if row.name == "FSDP2, hybrid"],
}


@functools.cache
def matrix(mode: str) -> dict[str, dict[str, Any]]:
    """Entries of one call of the command, by row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "matrix.json"
        ended = subprocess.run(
            [
                *(sys.executable, str(INTEGRATION / "matrix.py"), "--json", str(path)),
                *("--compiler", COMPILER, "--modes", mode),
                *("--rows", *(row.name for row in RUNS[mode])),
            ],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert path.exists(), ended.stdout + ended.stderr
        entries = json.loads(path.read_text())["entries"]
    return {entry["row"]: entry for entry in entries}


@pytest.mark.parametrize(
    ("mode", "row"),
    [(mode, row) for mode, rows in RUNS.items() for row in rows],
    ids=lambda value: getattr(value, "name", value),
)
def test_script_trains_unchanged(mode: str, row: Row) -> None:
    if importlib.util.find_spec(row.needs) is None:
        pytest.skip(f"{row.needs} is not installed")
    entry = matrix(mode)[row.name]
    assert entry["passed"], entry["why"]
    assert (entry["exchanges"] > 0) == row.compresses(mode)


def test_losses_are_found_in_what_scripts_print() -> None:
    output = "step 1: loss 2.5\nepoch 0 | batch 1 | loss 1e-3\n{'loss': 3}\nval 7\nloss nan"
    found = losses_of(output)
    assert found[:2] == [2.5, 1e-3]
    assert len(found) == 3
    assert found[2] != found[2]
