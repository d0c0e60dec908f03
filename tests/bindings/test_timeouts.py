"""A group's time-out that the script changes after the group was made."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import batches, train, wrapped
from ranks import run
from torch.distributed import distributed_c10d

SHORT, LONG = 1.0, 30.0

EXACT: dict[str, Callable[[], Any]] = {
    "all_reduce": lambda: dist.all_reduce(torch.ones(4)),
    "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(torch.empty(4), torch.ones(8)),
    "barrier": lambda: dist.barrier(),
    "recv": lambda: dist.recv(torch.ones(4), 1 - dist.get_rank()),
}


def _set(seconds: float) -> None:
    group = dist.group.WORLD
    assert group is not None
    group.set_timeout(datetime.timedelta(seconds=seconds))


def _store() -> dist.Store:
    return distributed_c10d._get_default_store()


def _one_comes(rank: int, act: Callable[[], Any], says: str) -> bool:
    """Rank 1 stays away until rank 0 has found it."""
    if rank == 0:
        began = time.monotonic()
        with pytest.raises(dist.DistBackendError, match=says):
            act()
        assert SHORT - 0.1 < time.monotonic() - began < LONG / 2
        _store().set("failed", "")
    else:
        _store().wait(["failed"], datetime.timedelta(seconds=LONG))
    return True


def _lowered(rank: int, size: int, name: str) -> bool:
    dist.all_reduce(torch.ones(1))
    _set(SHORT)
    return _one_comes(rank, EXACT[name], "rank 0")


@pytest.mark.parametrize("name", EXACT)
def test_exact_operations_heed_a_time_out_that_is_lowered(name: str) -> None:
    run(2, _lowered, name, timeout=LONG)


def _raised(rank: int, size: int, name: str) -> bool:
    dist.all_reduce(torch.ones(1))
    _set(LONG)
    if rank == 1:
        time.sleep(2.5 * SHORT)
    if name == "recv" and rank == 1:
        dist.send(torch.ones(4), 0)
    else:
        EXACT[name]()
    return True


@pytest.mark.parametrize("name", EXACT)
def test_exact_operations_heed_a_time_out_that_is_raised(name: str) -> None:
    run(2, _raised, name, timeout=SHORT)


def _exchange_lowered(rank: int, size: int) -> bool:
    module = wrapped()
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer, batches(rank, 2))
    _set(SHORT)
    return _one_comes(rank, lambda: train(module, optimizer, batches(rank, 3)), "rank 1")


@pytest.mark.parametrize("mode", ["weights", "ef"])
def test_exchanges_heed_a_time_out_that_is_lowered(mode: str) -> None:
    run(2, _exchange_lowered, timeout=LONG, env={"DISTRO_MODE": mode, "DISTRO_MIN_ELEMENTS": "1"})


def _exchange_raised(rank: int, size: int) -> bool:
    module = wrapped()
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer, batches(rank, 2))
    _set(LONG)
    if rank == 1:
        time.sleep(2.5 * SHORT)
    train(module, optimizer, batches(rank, 3))
    return True


@pytest.mark.parametrize("mode", ["weights", "ef"])
def test_exchanges_heed_a_time_out_that_is_raised(mode: str) -> None:
    run(2, _exchange_raised, timeout=SHORT, env={"DISTRO_MODE": mode, "DISTRO_MIN_ELEMENTS": "1"})


def _by_group(timeout: datetime.timedelta) -> None:
    distributed_c10d._set_pg_timeout(timeout)


def _by_backend(timeout: datetime.timedelta) -> None:
    backend: Any = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    backend._set_default_timeout(timeout)


def _by(rank: int, size: int, set_timeout: Callable[[datetime.timedelta], None]) -> bool:
    dist.all_reduce(torch.ones(1))
    set_timeout(datetime.timedelta(seconds=SHORT))
    return _one_comes(rank, EXACT["all_reduce"], "rank 0")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("set_timeout", [_by_group, _by_backend])
def test_the_functions_that_frameworks_call_reach_the_group(
    set_timeout: Callable[[datetime.timedelta], None],
) -> None:
    run(2, _by, set_timeout, timeout=LONG)
