"""A torchtitan-like script of hybrid sharding, and its comparison, on sizes that take seconds."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

INTEGRATION = Path(__file__).resolve().parents[2] / "integration"
RANKS, STEPS = 4, 6
SIZES = {"steps": STEPS, "batch": 2, "length": 16, "layers": 2, "heads": 2, "width": 32}
SIZES |= {"warmup": 2, "eval-windows": 8}
TINY = [part for name, size in SIZES.items() for part in (f"--{name}", str(size))]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_distro") is None, reason="torch_distro is not installed"
)


def compare(folder: Path, *options: str) -> list[dict[str, Any]]:
    path = folder / "rows.json"
    ended = subprocess.run(
        [
            *(sys.executable, str(INTEGRATION / "compare_hybrid.py"), "--json", str(path)),
            *(*options, *TINY),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    assert "references" in ended.stdout
    return rows


def test_compiled_and_clipped_blocks_train_unchanged(tmp_path: Path) -> None:
    options = ["--compile", "aot_eager", "--tied", "--bf16"]
    gloo, distro = compare(tmp_path, "--fsdp", "2", "--backends", "gloo", "distro", *options)
    assert distro["modes"] == ["weights"]
    assert distro["exchanges"] == STEPS - 1
    assert distro["references_equal"]
    # Replicas of gloo are one model, those of distro differ by what they have not sent.
    assert len(set(gloo["val_losses"])) == 1
    assert len(set(distro["val_losses"])) == 2
    assert gloo["val_loss_average"] == pytest.approx(gloo["val_losses"][0])
    for row in (gloo, distro):
        assert row["val_loss_average"] < 4.5  # finite, and not worse than at the start


def test_replicas_alone_have_data_of_their_own(tmp_path: Path) -> None:
    (row,) = compare(tmp_path, "--fsdp", "1", "--backends", "alone")
    assert len(set(row["val_losses"])) == 2
    assert row["val_loss_average"] is None
