"""A rank that dies is a DistBackendError on every other rank that names it, within the time-out."""

from __future__ import annotations

import datetime
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import batches, train, wrapped
from ranks import RankError, launch
from torch_distro import _inner

RANKS, TIMEOUT = 4, 20.0
SEED = int(os.environ.get("TEST_SEED", 0)) or random.SystemRandom().randrange(1, 2**31)


def _kill_soon(delay: float) -> None:
    def kill() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def _train_until_killed(rank: int, size: int, victim: int, delay: float) -> float:
    if rank == victim:
        _kill_soon(delay)
    start = time.monotonic()
    try:
        module = wrapped()
        optimizer = torch.optim.AdamW(module.parameters())
        while time.monotonic() < start + 60:
            train(module, optimizer, batches(rank, 1))
    except dist.DistBackendError as error:
        raise RuntimeError(f"after {time.monotonic() - start - delay:.2f} s: {error}") from error
    raise AssertionError("nobody told this rank that another is dead")


def _expect_blame(outcome: list[Any], victim: int, context: str) -> None:
    for rank, result in enumerate(outcome):
        if rank == victim:
            assert result is None, f"{context}: the victim says {result}"
            continue
        assert isinstance(result, RankError), f"{context}: rank {rank} did not fail"
        assert result.kind == "RuntimeError", f"{context}: {result}"
        assert f"rank {victim}" in result.message, f"{context}: rank {rank} says {result.message}"
        seconds = float(result.message.removeprefix("after ").split(" s:")[0])
        assert seconds < TIMEOUT, f"{context}: rank {rank} took {seconds} s"


@pytest.mark.parametrize("round", range(20))
def test_a_rank_killed_at_a_random_moment_is_named_by_every_survivor(round: int) -> None:
    draw = random.Random(SEED + round)
    victim, delay = draw.randrange(RANKS), draw.uniform(0.0, 0.6)
    context = f"TEST_SEED={SEED}, round {round}: rank {victim} killed after {delay:.3f} s"
    print(context)
    outcome = launch(RANKS, _train_until_killed, victim, delay, timeout=TIMEOUT)
    _expect_blame(outcome, victim, context)


def _collectives_until_killed(rank: int, size: int, victim: int, delay: float) -> float:
    if rank == victim:
        _kill_soon(delay)
    start = time.monotonic()
    x = torch.ones(1000)
    try:
        while time.monotonic() < start + 60:
            dist.all_reduce(x.clone())
    except dist.DistBackendError as error:
        raise RuntimeError(f"after {time.monotonic() - start - delay:.2f} s: {error}") from error
    raise AssertionError("nobody told this rank that another is dead")


@pytest.mark.parametrize("mode", ["auto", "dense"])
def test_a_rank_killed_in_an_exact_collective_is_named_by_every_survivor(mode: str) -> None:
    outcome = launch(
        RANKS, _collectives_until_killed, 1, 0.3, timeout=TIMEOUT, env={"DISTRO_MODE": mode}
    )
    _expect_blame(outcome, 1, f"mode {mode}")


def _stop(rank: int, size: int) -> float:
    module = wrapped()
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer, batches(rank, 3))
    if rank == 2:
        time.sleep(12)
        return 0.0
    start = time.monotonic()
    try:
        train(module, optimizer, batches(rank, 5))
    except dist.DistBackendError as error:
        raise RuntimeError(f"after {time.monotonic() - start:.2f} s: {error}") from error
    return 0.0


def test_a_rank_that_hangs_is_named_at_the_time_out() -> None:
    outcome = launch(3, _stop, timeout=3.0)
    for result in outcome[:2]:
        assert isinstance(result, RankError)
        assert "rank 2" in result.message
        assert float(result.message.removeprefix("after ").split(" s:")[0]) < 8


def _wait_for_one_that_waits(rank: int, size: int) -> bool:
    """Rank 2 is stopped, rank 0 stays away as if it waited for it, and rank 1 awaits rank 0."""
    module = wrapped()
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer, batches(rank, 3))
    dist.barrier()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == 0:
        time.sleep(6)
    train(module, optimizer, batches(rank, 5))
    return True


def test_not_the_late_rank_but_the_one_that_does_not_answer_is_named() -> None:
    outcome = launch(3, _wait_for_one_that_waits, timeout=3.0, awaited=[0, 1])
    for result in outcome[:2]:
        assert isinstance(result, RankError)
        assert result.kind == "DistBackendError"
        assert "rank 2 is connected but has not answered" in result.message, result.message
    assert "for rank 0's exchange" in str(outcome[1])


def _no_inner_backend(rank: int, size: int, path: str) -> None:
    if rank == 1:

        def fail(*_: object) -> None:
            time.sleep(0.5)  # the others are connected by now
            raise RuntimeError("no more sockets")

        vars(_inner)["_gloo"] = fail
    dist.init_process_group(
        "distro",
        init_method=f"file://{path}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=4),
    )


def test_a_rank_that_cannot_make_its_backend_is_named_with_the_reason(tmp_path: Path) -> None:
    for result in launch(3, _no_inner_backend, f"{tmp_path}/store", backend=None):
        assert isinstance(result, RankError)
        assert result.kind == "DistBackendError"
        assert "rank 1" in result.message
        assert "no more sockets" in result.message


def _exception(rank: int, size: int) -> bool:
    module = wrapped()

    def fail(step: int) -> None:
        if rank == 0 and step == 3:
            raise KeyError("a bug in the script")

    train(module, torch.optim.AdamW(module.parameters()), batches(rank, 9), fail)
    return True


def test_an_exception_in_one_ranks_script_is_an_error_on_the_others_that_names_it() -> None:
    outcome = launch(3, _exception, timeout=TIMEOUT)
    first, *others = outcome
    assert isinstance(first, RankError)
    assert first.kind == "KeyError"
    for result in others:
        assert isinstance(result, RankError)
        assert result.kind == "DistBackendError"
        assert "rank 0" in result.message
