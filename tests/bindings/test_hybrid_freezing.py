"""Hybrid sharding where parameters are frozen and thawed in the course of a training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_distro
from hybrid import KINDS, check_equals_gloo, grid, local, modes_of, net, replicas_of, shard, step
from models import batches
from ranks import run
from torch import nn
from torch.distributed.tensor import DTensor

PHASES = ((True, 3), (False, 3), (True, 3))


def _train(
    module: Any,  # noqa: ANN401
    optimizer: torch.optim.Optimizer,
    part: nn.Module,
    rank: int,
) -> tuple[list[float], list[list[torch.Tensor]]]:
    """Losses of phases in which a part is trained and is not, and that part's weights in each."""
    data = iter(batches(rank, sum(steps for _, steps in PHASES)))
    losses, weights = [], []
    for trained, steps in PHASES:
        part.requires_grad_(trained)
        seen = []
        for _ in range(steps):
            losses.append(step(module, optimizer, next(data)))
            parts = [p.to_local() if isinstance(p, DTensor) else p for p in part.parameters()]
            seen.append(torch.cat([part.detach().reshape(-1) for part in parts]))
        weights.append(seen)
    return losses, weights


def _by_sgd(rank: int, size: int, kind: str, build: Any) -> dict[str, Any]:  # noqa: ANN401
    module = build(kind)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses, _ = _train(module, optimizer, module[0], rank)
    modes = modes_of(module) if dist.get_backend() == "distro" else []
    return {"losses": losses, "weights": local(module), "modes": modes}


def _plain(kind: str) -> Any:  # noqa: ANN401
    return shard(kind, net())


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_is_frozen_for_a_while_is_trained_as_by_gloo(kind: str) -> None:
    check_equals_gloo(kind, _plain, train=_by_sgd)


def _by_adamw(rank: int, size: int, kind: str) -> dict[str, Any]:
    module = _plain(kind)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    _, weights = _train(module, optimizer, module[0], rank)
    checksum = torch_distro.stats(replicas_of(module))["reference_checksum"]
    torch_distro.average(module)
    return {"frozen": weights[1], "checksum": checksum, "averaged": local(module)}


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_rest_at_their_mean(kind: str) -> None:
    ran = run(4, _by_adamw, kind)
    for rank, own in enumerate(ran):
        other = ran[(rank + 2) % 4]
        # It is noticed in the first backward without them.
        assert torch.equal(own["frozen"][1], own["frozen"][2])
        assert torch.equal(own["frozen"][2], other["frozen"][2])
        assert own["checksum"] == other["checksum"]
        assert torch.equal(own["averaged"], other["averaged"])


def _adversaries(rank: int, size: int) -> dict[str, Any]:
    """Each of two modules is frozen while the other learns through it, which FSDP1 cannot."""
    mesh = grid()
    modules = [shard("fsdp2", net(), mesh=mesh) for _ in range(2)]
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-2) for module in modules]
    for x in batches(rank, 5):
        for learner, optimizer in zip(modules, optimizers, strict=True):
            for module in modules:
                module.requires_grad_(module is learner)
            modules[1](modules[0](x)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return dict(torch_distro.stats(replicas_of(modules[0])))


def test_a_module_that_is_frozen_for_anothers_step_goes_on_exchanging() -> None:
    for stats in run(4, _adversaries):
        # The second is met frozen: its first exchange is a mean.
        assert [module["exchanges"] for module in stats["modules"]] == [5, 3]
        assert stats["resyncs"] == 0
