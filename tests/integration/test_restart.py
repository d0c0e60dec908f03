"""A killed rank under `torchrun --max-restarts`: the others say who, and the training goes on.

`pytest -rP` prints the seconds from the kill to the others' error, and to the next training step.
TEST_SEED repeats a run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
INTEGRATION = HERE.parents[1] / "integration"
sys.path.insert(0, str(INTEGRATION))

from launch import Ended, agents, free_port  # noqa: E402

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_distro") is None, reason="torch_distro is not installed"
)

SEED = int(os.environ.get("TEST_SEED", 0)) or random.SystemRandom().randrange(1, 2**31)
STEPS, SAVED = 30, 20
SIZES: dict[str, float] = {
    "steps": STEPS,
    "batch": 4,
    "block": 16,
    "layers": 1,
    "heads": 2,
    "width": 32,
}
SIZES |= {"warmup": 2, "eval-every": 50, "eval-windows": 64, "lr": 0.01}
SIZES |= {"checkpoint-every": SAVED}
SMALL = [part for name, size in SIZES.items() for part in (f"--{name}", str(size))]


@dataclass(frozen=True)
class Run:
    """What a training that was to be disturbed, or not, left behind."""

    output: str
    notes: list[dict[str, Any]]
    result: dict[str, Any]

    def noted(self, event: str, life: int) -> dict[int, dict[str, Any]]:
        """By rank."""
        found = (n for n in self.notes if n["event"] == event and n["life"] == life)
        return {note["rank"]: note for note in found}

    @property
    def losses(self) -> list[float]:
        return list(self.result["history"]["train"])


def train(
    folder: Path,
    backend: str,
    doom: dict[str, Any],
    nodes: int = 1,
    ranks: int = 4,
    saves: str = "all",
    env: dict[str, str] | None = None,
    checkpoint: Path | None = None,
) -> Run:
    """Train the quick start's script under torchrun, an agent for each node."""
    folder.mkdir(exist_ok=True)
    doom = {"folder": str(folder), "rank": -1, "step": 0, "delay": 0.0, "stays": nodes == 1, **doom}
    meeting = [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-id={folder.name}"]
    meeting += [f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    commands = []
    for node in range(nodes):
        command = [*(_elsewhere() if node else []), sys.executable]
        command += ["-m", "torch.distributed.run", *meeting]
        command += [
            "--max-restarts=2",
            f"--nproc-per-node={ranks // nodes}",
            "--local-addr=127.0.0.1",
        ]
        command += [str(HERE / "doomed.py"), str(INTEGRATION / "train_gpt.py")]
        command += ["--backend", backend, "--out", str(folder / "out.json"), *SMALL]
        # A machine has its own files.
        own = checkpoint or folder / f"checkpoint{node}"
        command += ["--checkpoint", str(own), "--checkpoint-ranks", saves]
        commands.append(command)
    ended = agents(commands, [{"DOOM": json.dumps(doom), **(env or {})}] * nodes, folder, 120.0)
    assert ended.succeeded, f"TEST_SEED={SEED}: {ended.why_not()}\n{_all(ended)}"
    notes = [
        json.loads(line)
        for path in sorted(folder.glob("rank*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return Run(_all(ended), notes, json.loads((folder / "out.json").read_text()))


def _elsewhere() -> list[str]:
    """What makes ranks of another machine of those that a command starts, where that may be done:

    without the processes of this one in sight.
    """
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    able = (
        shutil.which("unshare") and subprocess.run([*command, "true"], check=False).returncode == 0
    )
    return command if able else []


def _all(ended: Ended) -> str:
    return "\n".join(ended.outputs)


def _middle(draw: random.Random, ranks: int) -> dict[str, Any]:
    """A kill between two checkpoints, at any moment of a step."""
    return {
        "rank": draw.randrange(ranks),
        "step": draw.randrange(SAVED + 1, STEPS - 2),
        "delay": draw.uniform(0.0, 0.01),
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A whole run, and what comes of one that was stopped at its checkpoint and started again."""
    folder = tmp_path_factory.mktemp("undisturbed")
    checkpoint = folder / "checkpoint"
    whole = train(folder / "whole", "distro", {}, checkpoint=checkpoint)
    return whole, train(folder / "resumed", "distro", {}, checkpoint=checkpoint)


def _seconds(run: Run) -> str:
    killed = next(iter(run.noted("killed", 0).values()))["time"]
    later = {
        "errors of the others": [note["time"] - killed for note in run.noted("error", 0).values()],
        "start of the next": [note["time"] - killed for note in run.noted("start", 1).values()],
        "first step": [note["time"] - killed for note in run.noted("first step", 1).values()],
    }
    return "; ".join(
        f"{what} {min(times):.2f} to {max(times):.2f} s" for what, times in later.items() if times
    )


def _check(run: Run, doom: dict[str, Any], ranks: int, saved_by: str, nodes: int = 1) -> None:
    """Who was killed was named at once, and all ranks went on."""
    context = f"TEST_SEED={SEED}: {doom}\n{run.output}"
    print(f"TEST_SEED={SEED}: {doom}: after the kill: {_seconds(run)}")
    errors = run.noted("error", 0)
    blamed = {doom["rank"]}
    if nodes == 1:
        assert set(errors) == set(range(ranks)) - blamed, context
    else:  # torchrun may end the others of a machine before, and be the one who killed them
        own = ranks // nodes
        blamed = {rank for rank in range(ranks) if rank // own == doom["rank"] // own}
    for error in errors.values():
        assert any(f"because of rank {rank}:" in error["text"] for rank in blamed), context
    # Nobody was found out by waiting.
    assert "not answered" not in run.output, context
    assert "time-out" not in run.output, context
    assert "atchdog" not in run.output, context
    assert set(run.noted("end", 1)) == set(range(ranks)), context
    assert not run.noted("error", 1), context
    assert f"goes on from step {SAVED}, saved by {saved_by}" in run.output, context
    assert len(run.losses) == STEPS, context
    checksums = {each["reference_checksum"] for each in run.result["per_rank"]}
    assert len(checksums) == 1, context


def _near(run: Run, whole: Run) -> None:
    """The loss went on where it was, within what differs from batch to batch, or below: all weights
    have come to W + share * R at once, which they else do in turns."""
    assert run.losses[:SAVED] == whole.losses[:SAVED]
    gaps = [a - b for a, b in zip(run.losses[SAVED:], whole.losses[SAVED:], strict=True)]
    print(f"losses after the restart: {run.losses[SAVED:]}, undisturbed: {whole.losses[SAVED:]}")
    assert max(gaps) < 0.1, gaps
    assert abs(run.result["val_loss_average"] - whole.result["val_loss_average"]) < 0.1


def test_a_killed_rank_comes_back_as_if_the_run_had_been_stopped(
    undisturbed: tuple[Run, Run], tmp_path: Path
) -> None:
    whole, resumed = undisturbed
    doom = _middle(random.Random(SEED), 4)
    run = train(tmp_path / "killed", "distro", doom)
    _check(run, doom, 4, "all ranks")
    assert run.losses == resumed.losses  # bit for bit: the kill has left no trace
    assert run.result["val_loss_average"] == resumed.result["val_loss_average"]
    _near(run, whole)


def test_a_run_whose_rank_0_alone_saves_is_resynchronised(
    undisturbed: tuple[Run, Run], tmp_path: Path
) -> None:
    whole, _ = undisturbed
    doom = _middle(random.Random(SEED + 1), 4)
    run = train(tmp_path / "killed", "distro", doom, saves="first")
    _check(run, doom, 4, "rank 0")
    _near(run, whole)


def test_a_killed_rank_of_another_machine_comes_back(
    undisturbed: tuple[Run, Run], tmp_path: Path
) -> None:
    _, resumed = undisturbed
    draw = random.Random(SEED + 2)
    doom = {**_middle(draw, 4), "rank": draw.choice([2, 3])}
    run = train(tmp_path / "killed", "distro", doom, nodes=2)
    _check(run, doom, 4, "all ranks", nodes=2)
    assert run.losses == resumed.losses


def test_of_compressed_gradients_a_killed_run_has_the_bits_of_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    env = {"DISTRO_MODE": "ef"}
    whole = train(tmp_path / "whole", "distro", {}, ranks=2, env=env)
    doom = _middle(random.Random(SEED + 3), 2)
    run = train(tmp_path / "killed", "distro", doom, ranks=2, env=env)
    _check(run, doom, 2, "all ranks")
    assert run.losses == whole.losses
    assert run.result["val_loss"] == whole.result["val_loss"]
