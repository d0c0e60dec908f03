"""The same training over tcp, ipc (processes) and inproc (threads).

All give the same reference at every step.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_distro
from models import batches, flat, train, wrapped
from ranks import run

STEPS = 200


def _train(rank: int, size: int) -> dict[str, Any]:
    module = wrapped()  # all ranks take rank 0's weights
    checksums: list[int] = []
    train(
        module,
        torch.optim.AdamW(module.parameters(), lr=1e-2),
        batches(rank, STEPS),
        lambda _: checksums.append(torch_distro.stats()["reference_checksum"]),
    )
    torch_distro.average(module)
    return {"checksums": checksums, "weights": flat(module)}


def _threads(size: int) -> list[dict[str, Any]]:
    """Ranks that are threads, by the means with which torch tests its own collectives."""
    from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg

    torch._C._distributed_c10d._set_thread_isolation_mode(True)  # type: ignore[attr-defined]
    _install_threaded_pg()
    store = dist.HashStore()
    results: dict[int, dict[str, Any]] = {}

    def body(rank: int) -> None:
        dist.init_process_group("distro", store=store, rank=rank, world_size=size)
        results[rank] = _train(rank, size)
        dist.destroy_process_group()

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(size)]


def _threads_in_a_process(size: int) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, __file__, str(size)],
        env={**os.environ, "DISTRO_TRANSPORT": "inproc"},
        capture_output=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return pickle.loads(done.stdout)


@pytest.mark.parametrize("size", [2, 4])
def test_reference_is_the_same_on_all_ranks_over_all_carriers_at_every_step(size: int) -> None:
    tcp = run(size, _train)
    ipc = run(size, _train, env={"DISTRO_TRANSPORT": "ipc"})
    inproc = _threads_in_a_process(size)
    for results in (tcp, ipc, inproc):
        for result in results:
            assert len(result["checksums"]) == STEPS
            assert result["checksums"] == tcp[0]["checksums"]
            assert torch.equal(result["weights"], tcp[0]["weights"])


if __name__ == "__main__":
    sys.stdout.buffer.write(pickle.dumps(_threads(int(sys.argv[1]))))
