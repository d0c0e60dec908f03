"""Modes ef and demo: ranks that differ, die or come late are named on every rank, in time."""

from __future__ import annotations

import datetime
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch_distro
from gradient_models import data, model, reductions
from ranks import RankError, fail, launch, run
from torch.nn.parallel import DistributedDataParallel

EF = {"mode": "ef"}


@contextmanager
def _ended_properly() -> Iterator[None]:
    """What a rank has said reaches the others also if it fails first, as at a script's exit."""
    try:
        yield
    finally:
        dist.destroy_process_group()


def _sizes(rank: int, size: int) -> bool:
    with _ended_properly():
        dist.all_reduce(torch.ones(5000 + rank // 2))
    return True


def _operators(rank: int, size: int) -> bool:
    x = torch.ones(5000)
    with _ended_properly():
        dist.all_reduce(x, dist.ReduceOp.AVG if rank == 1 else dist.ReduceOp.SUM)
    return True


def _models(rank: int, size: int) -> bool:
    module = DistributedDataParallel(torch.nn.Linear(200, 100))
    with _ended_properly():
        if rank == 0:
            module(torch.ones(2, 200)).sum().backward()
        else:  # as many elements, reduced by hand
            x = torch.ones(200 * 100 + 100, requires_grad=True)
            x.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
            x.sum().backward()
    return True


def test_different_sizes_operators_and_tensors_are_an_error_on_all_ranks_that_names_them() -> None:
    for error in fail(3, _sizes, options=EF, deadline=30):
        assert error.kind == "DistBackendError"
        assert "where rank 0 has flat float32 [5000], rank 2 has flat float32 [5001]" in str(error)
    for error in fail(3, _operators, options=EF, deadline=30):
        assert error.kind == "DistBackendError"
        assert "where rank 0 has all-reduce SUM, rank 1 has all-reduce AVG" in error.message
    for error in fail(2, _models, options=EF, deadline=30):
        assert error.kind == "DistBackendError"
        assert "where rank 0 has mean of a gradient bucket, rank 1 has all-reduce SUM" in str(error)


def _modes(rank: int, size: int, path: str) -> bool:
    options = torch_distro.Options(mode="demo" if rank else "ef")
    dist.init_process_group(
        "distro", init_method=f"file://{path}", rank=rank, world_size=size, pg_options=options
    )
    return True


def test_different_modes_are_an_error_at_the_start(tmp_path: Path) -> None:
    for error in fail(2, _modes, f"{tmp_path}/store", backend=None):
        assert "mode: rank 1 has demo; rank 0 has ef" in error.message


def _killed(rank: int, size: int) -> float:
    module = DistributedDataParallel(model())
    for step in range(50):
        loss = module(data(rank, step)).sum()
        if rank == 1 and step == 3:  # while the others have sent and wait

            def die(gradient: torch.Tensor) -> None:
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGKILL)

            module.module.first.weight.register_hook(die)
        start = time.monotonic()
        try:
            loss.backward()
        except dist.DistBackendError as error:
            assert time.monotonic() - start < 10
            raise RuntimeError(str(error)) from error
    return 0.0


def test_a_rank_killed_during_a_reduction_is_named_by_every_survivor() -> None:
    outcome = launch(3, _killed, options=EF, timeout=20, deadline=60)
    assert outcome[1] is None
    for result in (outcome[0], outcome[2]):
        assert isinstance(result, RankError)
        assert result.kind == "RuntimeError", result
        assert "rank 1" in result.message


def _killed_in_a_small_bucket(rank: int, size: int) -> bool:
    module = DistributedDataParallel(torch.nn.Linear(8, 8))
    for step in range(100):
        if rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        module(torch.ones(2, 8)).sum().backward()
    return True


def test_a_rank_killed_while_small_buckets_are_reduced_exactly_is_named() -> None:
    outcome = launch(2, _killed_in_a_small_bucket, options=EF, timeout=20)[0]
    assert isinstance(outcome, RankError)
    assert outcome.kind == "DistBackendError"
    assert "rank 1" in outcome.message


def _killed_before_a_scatter(rank: int, size: int) -> bool:
    output, x = torch.empty(5000), torch.ones(5000 * size)
    dist.reduce_scatter_tensor(output, x)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.reduce_scatter_tensor(output, x)
    return True


def test_a_rank_killed_before_an_exact_reduce_scatter_is_named_by_every_survivor() -> None:
    options = {"mode": "ef", "reduce_scatter": "compress"}
    for outcome in launch(3, _killed_before_a_scatter, options=options, timeout=20)[:2]:
        assert isinstance(outcome, RankError)
        assert outcome.kind == "DistBackendError"
        assert "because of rank 2" in outcome.message


def _late(rank: int, size: int) -> bool:
    if rank == 1:
        time.sleep(4)
        return True
    work = dist.all_reduce(torch.ones(5000), async_op=True)
    start = time.monotonic()
    with pytest.raises(dist.DistBackendError, match="time-out of this wait"):
        work.wait(datetime.timedelta(milliseconds=200))
    assert time.monotonic() - start < 1.5
    work.wait()
    return True


def test_a_rank_that_does_not_come_is_named_at_the_time_out() -> None:
    outcome = launch(3, _late, options=EF, timeout=2)
    for result in (outcome[0], outcome[2]):
        assert isinstance(result, RankError)
        assert result.kind == "DistBackendError"
        assert "rank 1" in result.message


def _unwaited(rank: int, size: int) -> bool:
    tensors = [torch.full((5000 + i,), float(rank)) for i in range(20)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    time.sleep(0.3 * rank)  # the others have everything in flight when they destroy the group
    dist.destroy_process_group()
    assert all(work.is_completed() for work in works)
    return True


def test_destroying_a_group_finishes_what_is_in_flight() -> None:
    assert run(3, _unwaited, options=EF) == [True] * 3


def _again(rank: int, size: int, folder: str) -> list[tuple[int, int]]:
    held = []
    for cycle in range(12):
        dist.init_process_group(
            "distro",
            store=dist.FileStore(f"{folder}/store{cycle}", size),
            rank=rank,
            world_size=size,
            pg_options=torch_distro.Options(mode="ef", transport="ipc"),
        )
        module = DistributedDataParallel(model())
        with reductions(1):
            module(data(rank, 0)).sum().backward()
        del module
        dist.destroy_process_group()
        held.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    return held


def test_groups_made_and_destroyed_again_and_again_leak_nothing(tmp_path: Path) -> None:
    for held in run(2, _again, str(tmp_path), backend=None):
        assert held[-1][0] <= held[5][0] + 1, held
        assert held[-1][1] <= held[5][1] + 1, held
