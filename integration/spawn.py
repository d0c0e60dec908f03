"""Ranks of a bench: processes of this machine that meet over loopback."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(
    rank: int,
    ranks: int,
    port: int,
    queue: Any,  # noqa: ANN401 - a multiprocessing queue
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    result = function(rank, ranks, *arguments)
    dist.destroy_process_group()
    queue.put((rank, result))


def run_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:  # noqa: ANN401
    """`function(rank, ranks, *arguments)` on each rank, in processes; its results by rank.

    Raises:
        torch.multiprocessing.ProcessRaisedException: what the first failing rank raised.
    """
    # A store of the parent's keeps the port, so that no other program can take it in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # ranks join this store, none makes its own
    queue = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(
        _rank, (ranks, store.port, queue, function, arguments), nprocs=ranks, join=False
    )
    while not context.join():
        pass
    return [result for _, result in sorted(queue.get() for _ in range(ranks))]
