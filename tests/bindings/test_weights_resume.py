"""`weights` mode across a restart."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch_distro
from models import adamw, batches, flat, train, wrapped
from ranks import run


def _resume(rank: int, size: int) -> dict[str, Any]:
    data = batches(rank, 10)
    module = wrapped()
    optimizer = adamw(module)
    train(module, optimizer, data[:5])
    state, script = torch_distro.state_dict(module), copy.deepcopy(optimizer.state_dict())
    if rank == 0:
        checkpoint: list[Any] = [copy.deepcopy(module.module.state_dict())]
    else:
        checkpoint = [None]
    dist.broadcast_object_list(checkpoint)
    resumed = wrapped(5)
    resumed.module.load_state_dict(checkpoint[0])  # rank 0's, as scripts do
    torch_distro.load_state_dict(resumed, state)
    assert state["reference"]["scale"].shape == torch.Size([])
    again = adamw(resumed)
    again.load_state_dict(script)
    train(resumed, again, data[5:])
    stats = torch_distro.stats()["modules"]
    torch_distro.average(resumed)
    return {"weights": flat(resumed), "exchanges": stats[1]["exchanges"]}


def test_a_resume_from_every_ranks_own_state() -> None:
    results = run(2, _resume)
    assert results[0]["exchanges"] == 8
    assert torch.equal(results[0]["weights"], results[1]["weights"])
