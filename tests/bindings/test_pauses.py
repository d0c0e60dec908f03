"""A rank that stands still for a while, or is slow: the result has the bits of a run without it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from typing import Any

import torch
import torch_distro
from models import adamw, batches, flat, train, wrapped
from ranks import run

SEED = int(os.environ.get("TEST_SEED", 0)) or random.SystemRandom().randrange(1, 2**31)
RANKS, STEPS = 3, 24
STANDS_STILL_SECONDS = 10


def _stand_still() -> None:
    """As a laptop does whose lid is closed: this process and all its threads."""
    process = os.getpid()
    command = f"sleep {STANDS_STILL_SECONDS}; kill -CONT {process}"
    subprocess.Popen(["sh", "-c", command])
    os.kill(process, signal.SIGSTOP)


def _train(rank: int, size: int, victim: int, at: int, pause_seconds: float) -> dict[str, Any]:
    """`at`: the step after which it stands still, -1 for none; `pause_seconds`: at each step."""
    module = wrapped()
    begin = time.monotonic()

    def after_step(step: int) -> None:
        if rank == victim and step == at:
            _stand_still()
        if rank == victim:
            time.sleep(pause_seconds)

    train(module, adamw(module), batches(rank, STEPS), after_step)
    stats = torch_distro.stats()
    own = flat(module)
    torch_distro.average(module)
    return {
        "own": own,
        "mean": flat(module),
        "reference": stats["reference_checksum"],
        "exchanges": stats["modules"][0]["exchanges"],
        "resyncs": stats["resyncs"],
        "payload": stats["payload_bytes_sent"],
        "seconds": time.monotonic() - begin,
    }


def _same(disturbed: list[dict[str, Any]], undisturbed: list[dict[str, Any]]) -> None:
    for got, expected in zip(disturbed, undisturbed, strict=True):
        for what in ("own", "mean"):
            assert torch.equal(got[what], expected[what]), what
        for what in ("reference", "exchanges", "resyncs", "payload"):
            assert got[what] == expected[what], what
    assert len({each["reference"] for each in disturbed}) == 1
    assert disturbed[0]["exchanges"] == STEPS - 1


def test_a_rank_that_stands_still_or_is_slow_changes_no_bit() -> None:
    draw = random.Random(SEED)
    victim, at = draw.randrange(RANKS), draw.randrange(2, STEPS - 2)
    print(f"TEST_SEED={SEED}: rank {victim}, step {at}")
    undisturbed = run(RANKS, _train, -1, -1, 0.0)
    still = run(RANKS, _train, victim, at, 0.0)
    # Nobody went on without it: what it did late is in what the others have.
    assert all(each["seconds"] > STANDS_STILL_SECONDS for each in still)
    _same(still, undisturbed)
    _same(run(RANKS, _train, victim, -1, 0.05), undisturbed)
