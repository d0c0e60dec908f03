"""What the profiler, torch's flight recorder and the log tell of this backend's operations."""

from __future__ import annotations

import datetime
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import batches, train, wrapped
from ranks import run
from torch.distributed import distributed_c10d


def _profiled(rank: int, size: int) -> bool:
    module = wrapped()
    optimizer = torch.optim.AdamW(module.parameters())
    with torch.profiler.profile(record_shapes=True) as profiler:
        dist.all_reduce(torch.ones(4, 3))
        dist.reduce_scatter_tensor(torch.empty(4), torch.ones(4 * size))
        train(module, optimizer, batches(rank, 3))
    events = {event.name: event for event in profiler.events() or []}
    assert events["distro:all_reduce"].is_async
    assert events["distro:all_reduce"].input_shapes == [[4, 3]]
    assert events["distro:_reduce_scatter_base"].input_shapes == [[4 * size]]
    assert "distro:exchange" in events
    assert "record_param_comms" in events
    return True


def test_the_profiler_shows_collectives_and_exchanges() -> None:
    run(2, _profiled)


def _hang(rank: int, size: int) -> list[tuple[str, str]]:
    for _ in range(3):
        dist.all_reduce(torch.ones(4))
    dist.reduce_scatter_tensor(torch.empty(4), torch.ones(4 * size))
    if rank == 1:
        time.sleep(1)
        dist.all_reduce(torch.ones(5))
        return []
    work: Any = dist.all_reduce(torch.ones(5), async_op=True)
    time.sleep(0.2)
    dump = json.loads(torch._C._distributed_c10d._dump_fr_trace_json(backend="distro"))  # type: ignore[call-arg]
    assert not work.is_completed()
    work.wait()
    return [(entry["profiling_name"], entry["state"]) for entry in dump["entries"]]


completion_hooks = pytest.mark.skipif(
    not hasattr(torch._C._distributed_c10d.Backend, "supports_completion_hooks"),
    reason="completion hooks came with torch 2.15",
)


@completion_hooks
def test_the_flight_recorder_tells_a_hung_collective_from_finished_ones() -> None:
    first = run(2, _hang)[0]
    assert first == [
        *[("distro:all_reduce", "completed")] * 3,
        ("distro:_reduce_scatter_base", "completed"),
        ("distro:all_reduce", "scheduled"),
    ]


def _dump_while_one_hangs(rank: int, size: int, folder: Path) -> bool:
    for _ in range(2):
        dist.all_reduce(torch.ones(5000))
    if rank == 0:
        dist.send(torch.ones(2), 1)
    else:
        dist.recv(torch.ones(2), 0)
    dist.barrier()
    work: Any = dist.all_reduce(torch.ones(6000), async_op=True) if rank == 0 else None
    dump = torch._C._distributed_c10d._dump_fr_trace(backend="distro")  # type: ignore[call-arg]
    (folder / f"rank_{rank}").write_bytes(dump)
    store = distributed_c10d._get_default_store()
    store.set(f"dumped/{rank}", "")
    store.wait(["dumped/0", "dumped/1"])
    if rank == 1:
        work = dist.all_reduce(torch.ones(6000), async_op=True)
    return bool(work.wait())


@completion_hooks
@pytest.mark.parametrize("mode", ["auto", "ef"])  # ef: the engine of gradient reductions
def test_torchfrtrace_names_the_rank_that_did_not_come_and_finds_the_rest_finished(
    mode: str, tmp_path: Path
) -> None:
    dumps = tmp_path / "dumps"
    dumps.mkdir()
    run(2, _dump_while_one_hangs, dumps, options={"mode": mode})
    command = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace"]
    found = subprocess.run(
        [*command, str(dumps), "-o", str(tmp_path / "database")],
        capture_output=True,
        text=True,
        check=True,
    )
    said = found.stdout + found.stderr
    assert said.count("Not all ranks joining collective") == 1, said
    assert "Not all ranks joining collective, sequence number: 4" in said
    assert "missing ranks: {1}" in said
    _, database = pickle.loads((tmp_path / "database").read_bytes())
    assert [(c.collective_name, c.collective_state) for c in database.collectives] == [
        *[("distro:all_reduce", "completed")] * 2,
        ("distro:send 0->1", "completed"),
        ("distro:barrier", "completed"),
        ("distro:all_reduce", "scheduled"),
    ]


def _late(rank: int, size: int) -> list[str]:
    if rank == 0:
        for _ in range(20):
            dist.all_reduce(torch.ones(2))
        with pytest.raises(dist.DistBackendError):
            dist.all_reduce(torch.ones(5))
    else:
        for _ in range(20):
            dist.all_reduce(torch.ones(2))
        time.sleep(3)
    backend: Any = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    return backend.last_operations().split("; ")


def test_the_last_operations_are_remembered_and_no_more() -> None:
    told, _ = run(2, _late, timeout=1, env={"TORCH_FR_DUMP_ON_TIMEOUT": "0"})
    assert len(told) == 16
    assert told[0].startswith("all_reduce 6, 8 bytes: 0.")
    assert told[-1].startswith("all_reduce 21, 20 bytes: not finished after")


def _patient(rank: int, size: int) -> bool:
    """A time-out given to wait() leaves the operation going."""
    short = datetime.timedelta(milliseconds=100)
    output = torch.empty(2)
    if rank == 1:
        time.sleep(1)
    work: Any = dist.reduce_scatter_tensor(output, torch.ones(4), async_op=True)
    other: Any = dist.all_reduce(torch.ones(2), async_op=True)
    if rank == 0:
        with pytest.raises(dist.DistBackendError, match="may be waited for again"):
            other.wait(short)
    assert other.wait()
    assert work.wait()
    assert output.tolist() == [2.0, 2.0]
    return True


def test_a_wait_that_timed_out_may_be_repeated() -> None:
    run(2, _patient)
