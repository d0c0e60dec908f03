"""The training script and the comparison, end to end on sizes that take seconds."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

INTEGRATION = Path(__file__).resolve().parents[2] / "integration"
RANKS, STEPS = 2, 12
SIZES = {"steps": STEPS, "batch": 2, "block": 16, "layers": 1, "heads": 2, "width": 32}
SIZES |= {"warmup": 2, "eval-every": 5, "eval-windows": 8}
TINY = [part for name, size in SIZES.items() for part in (f"--{name}", str(size))]

needs_distro = pytest.mark.skipif(
    importlib.util.find_spec("torch_distro") is None, reason="torch_distro is not installed"
)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}")


def train(backend: str, out: Path) -> dict[str, Any]:
    """Trains on two ranks and returns what rank 0 wrote."""
    ended = run(*TORCHRUN, INTEGRATION / "train_gpt.py", "--backend", backend, "--out", out, *TINY)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["ranks"] == RANKS
    assert result["steps"] == STEPS
    assert len(result["history"]["train"]) == STEPS
    assert [step for step, _ in result["history"]["validation"]] == [5, 10, STEPS]
    return result


def test_gloo_keeps_one_model(tmp_path: Path) -> None:
    result = train("gloo", tmp_path / "gloo.json")
    assert result["val_loss"] < math.log(65)  # better than guessing
    assert result["val_loss_average"] == result["val_loss"]
    assert [each["rank"] for each in result["per_rank"]] == list(range(RANKS))
    for each in result["per_rank"]:
        assert each["gradient_bytes"] == 4 * result["parameters"] * STEPS
        assert each["payload_bytes_sent"] is None
        assert each["step_seconds_median"] > 0
    # Each rank has data of its own, so the losses before averaging differ.
    assert result["per_rank"][0]["train_loss"] != result["per_rank"][1]["train_loss"]


NAMES_OF_THREADS = """
import pathlib, runpy, sys
import torch.distributed

def destroy(*arguments):
    original(*arguments)
    for name in pathlib.Path("/proc/self/task").glob("*/comm"):
        try:
            print("ran on:", name.read_text().strip())
        except OSError:
            pass  # it has ended meanwhile

original, torch.distributed.destroy_process_group = (
    torch.distributed.destroy_process_group, destroy
)
script = pathlib.Path(sys.argv.pop(1))
sys.path.insert(0, str(script.parent))
runpy.run_path(str(script), run_name="__main__")
"""


@pytest.mark.parametrize("backend", ["gloo", pytest.param("distro", marks=needs_distro)])
def test_no_thread_of_the_group_is_left_when_it_has_been_destroyed(
    backend: str, tmp_path: Path
) -> None:
    # One of gloo's that frees a tensor of Python's while the interpreter ends aborts the process.
    outer = tmp_path / "threads.py"
    outer.write_text(NAMES_OF_THREADS)
    ended = run(*TORCHRUN, outer, INTEGRATION / "train_gpt.py", "--backend", backend, *TINY)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("ran on: python") >= RANKS
    for group in ("gloo", "distro", "ZMQ"):
        assert f"ran on: {group}" not in ended.stdout
        assert f"ran on: pt_{group}" not in ended.stdout


def test_alone_sends_nothing(tmp_path: Path) -> None:
    first = train("none", tmp_path / "alone.json")
    second = json.loads((tmp_path / "alone.rank1.json").read_text())
    assert first["val_loss"] != second["val_loss"]
    assert first["val_loss_average"] is None
    for result in (first, second):
        assert [each["socket_bytes_sent"] for each in result["per_rank"]] == [0]


@needs_distro
def test_distro_sends_little_and_keeps_one_reference(tmp_path: Path) -> None:
    result = train("distro", tmp_path / "distro.json")
    assert result["val_loss_average"] < math.log(65)
    assert len({each["reference_checksum"] for each in result["per_rank"]}) == 1
    for each in result["per_rank"]:
        # The last step's move is not exchanged but averaged, so that it may not be counted.
        assert each["gradient_bytes"] / (4 * result["parameters"]) in (STEPS - 1, STEPS)
        assert 0 < each["payload_bytes_sent"] < each["gradient_bytes"] / 100
        assert each["socket_bytes_sent"] >= each["payload_bytes_sent"]


def test_comparison_writes_the_contract(tmp_path: Path) -> None:
    backends = ["gloo", "alone"] + (["distro"] if importlib.util.find_spec("torch_distro") else [])
    ended = run(
        INTEGRATION / "compare.py", "--ranks", str(RANKS), "--out", tmp_path, "--backends",
        *backends, "--k", "6", "32", *TINY,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads((tmp_path / "results.json").read_text())
    named = [(row["backend"], row["k"]) for row in rows]
    assert named[:2] == [("gloo", None), ("alone", None)]
    assert named[2:] == ([("distro", 6), ("distro", 32)] if "distro" in backends else [])
    for row in rows:
        for name in (
            "mode", "ranks", "steps", "train_loss", "val_loss", "val_loss_average",
            "gradient_bytes", "payload_bytes_sent", "socket_bytes_sent", "step_seconds_median",
        ):  # fmt: skip
            assert name in row
        assert len(row["per_rank"]["train_loss"]) == RANKS
        assert (
            row["mode"] == {"gloo": "dense", "alone": "none", "distro": "weights"}[row["backend"]]
        )
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "val of mean" in ended.stdout


def test_failing_run_fails_the_comparison(tmp_path: Path) -> None:
    ended = run(
        INTEGRATION / "compare.py", "--ranks", str(RANKS), "--out", tmp_path,
        "--backends", "alone", *TINY, "--heads", "3",
    )  # fmt: skip
    assert ended.returncode != 0
    assert "alone failed" in ended.stderr
    assert "RuntimeError" in ended.stderr  # the child's own words
    assert not (tmp_path / "results.json").exists()
