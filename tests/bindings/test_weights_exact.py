"""Modules that `weights` mode leaves exact, and that the ranks agree about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_distro
from models import adamw, batches, flat, train, wrapped
from ranks import fail, run


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


def _one_sided(rank: int, size: int, reason: str) -> bool:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.distributed.optim import ZeroRedundancyOptimizer

    module = wrapped()
    optimizer = adamw(module)
    if rank == 1 and reason == "hook":
        module.register_comm_hook(dist.group.WORLD, default_hooks.allreduce_hook)
    if rank == 1 and reason == "late":
        train(module, optimizer, batches(rank, 3))
    if rank == 1 and reason != "hook":
        optimizer = ZeroRedundancyOptimizer(module.parameters(), torch.optim.AdamW, lr=1e-2)
    train(module, optimizer, batches(rank, 9))
    return True


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("hook", "the script has a communication hook of its own"),
        ("zero", "ZeroRedundancyOptimizer"),
        ("late", "ZeroRedundancyOptimizer"),
    ],
)
def test_a_module_that_only_one_rank_leaves_exact_is_an_error_on_all_that_says_why(
    reason: str, says: str
) -> None:
    for error in fail(2, _one_sided, reason, timeout=20.0):
        assert error.kind == "DistBackendError"
        assert "rank 0 exchanges its weights" in error.message
        assert "rank 1 reduces its gradients exactly" in error.message
        assert says in error.message


def _stops_late(rank: int, size: int) -> dict[str, Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    module = wrapped()
    train(module, adamw(module), batches(rank, 4))
    apart = flat(module)
    optimizer = ZeroRedundancyOptimizer(module.parameters(), torch.optim.AdamW, lr=1e-2)
    train(module, optimizer, batches(rank, 4))
    torch_distro.average(module)
    return {"apart": apart, "weights": flat(module), "stats": torch_distro.stats()}


def test_a_module_that_all_ranks_stop_exchanging_goes_on_from_the_mean_exactly() -> None:
    first, second = run(2, _stops_late)
    assert not torch.equal(first["apart"], second["apart"])
    assert torch.allclose(first["weights"], second["weights"], atol=1e-7)
    assert first["stats"]["exchanges"] == 3
    assert first["stats"]["modules"][0]["mode"] == "exact"


def _lbfgs(rank: int, size: int) -> dict[str, Any]:
    module = wrapped()
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=4)
    x = batches(0, 1)[0]  # the same on all ranks, for LBFGS looks at the rank's own loss
    losses = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (module(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return {"weights": flat(module), "losses": losses, "stats": torch_distro.stats()}


def test_lbfgs_which_runs_the_model_several_times_a_step_is_exact() -> None:
    first, second = run(2, _lbfgs)
    assert torch.equal(first["weights"], second["weights"])
    assert first["losses"][-1] < first["losses"][0]
    assert "LBFGS" in first["stats"]["modules"][0]["reason"]
