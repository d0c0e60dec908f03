"""Modules that `weights` mode leaves exact, and that the ranks agree about it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch_distro
from models import adamw, batches, flat, train, wrapped
from ranks import run


def _zero(rank: int, size: int) -> dict[str, Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    module = wrapped()
    optimizer = ZeroRedundancyOptimizer(module.parameters(), torch.optim.AdamW, lr=1e-2)
    train(module, optimizer, batches(rank, 5))
    return {"weights": flat(module), "stats": torch_distro.stats()}


def test_a_sharded_optimizer_makes_the_module_exact() -> None:
    results = run(2, _zero)
    assert torch.equal(results[0]["weights"], results[1]["weights"])
    assert results[0]["stats"]["exchanges"] == 0
    assert results[0]["stats"]["modules"][0]["mode"] == "exact"
    assert "ZeroRedundancyOptimizer" in results[0]["stats"]["modules"][0]["reason"]


def _hooked(rank: int, size: int) -> dict[str, Any]:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    module = wrapped()
    module.register_comm_hook(dist.group.WORLD, default_hooks.allreduce_hook)
    train(module, adamw(module), batches(rank, 5))
    return {"weights": flat(module), "stats": torch_distro.stats()}


def test_a_communication_hook_of_the_script_is_respected() -> None:
    results = run(2, _hooked)
    assert torch.equal(results[0]["weights"], results[1]["weights"])
    assert results[0]["stats"]["modules"][0]["mode"] == "exact"
