"""Hybrid sharding (HSDP) on FSDP1 and FSDP2: replicas of shards are exchanged in weights mode."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_distro
from models import batches
from ranks import run
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

KINDS = ["fsdp1", "fsdp2"]
EVERYTHING = {"k": 4096, "value_bits": 32, "delay": 0}


def _wrapped(kind: str, width: int = 250, **kwargs: Any) -> Any:  # noqa: ANN401
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, 20))
    if kind == "fsdp2":
        fully_shard(net[0], mesh=mesh, **kwargs)
        return fully_shard(net, mesh=mesh, **kwargs)
    return FullyShardedDataParallel(
        net,
        device_mesh=mesh,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        use_orig_params=True,
        device_id=torch.device("cpu"),
        **kwargs,
    )


def _step(module: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    loss = (module(x) - x.roll(1, 1)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _local(module: nn.Module) -> torch.Tensor:
    """The shards of this rank, in one."""
    parts = [getattr(p, "_local_tensor", p).detach().reshape(-1) for p in module.parameters()]
    return torch.cat(parts).clone()


def _train(
    rank: int, size: int, kind: str, normalises: bool, evaluate: bool = False, steps: int = 8
) -> dict[str, Any]:
    module = _wrapped(kind)
    optimizer: torch.optim.Optimizer
    if normalises:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    else:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = []
    for x in batches(rank, steps):
        if evaluate:
            with torch.no_grad():
                module(x)
        losses.append(_step(module, optimizer, x))
    result = {"losses": losses, "weights": _local(module)}
    if dist.get_backend() == "distro":
        replicas = _replicas_of(module)
        result |= {
            "stats": torch_distro.stats(replicas),
            "ranks": dist.get_process_group_ranks(replicas),
        }
        torch_distro.average(module)
        result["averaged"] = _local(module)
    return result


def _replicas_of(module: nn.Module) -> Any:  # noqa: ANN401
    from torch_distro._attach import owners_of

    (owner,) = owners_of(module)
    return owner.process_group


@pytest.mark.parametrize("kind", KINDS)
def test_everything_sent_at_once_by_sgd_is_dense_training(kind: str) -> None:
    gloo = run(4, _train, kind, False, backend="gloo")
    distro = run(4, _train, kind, False, options=EVERYTHING)
    for ours, theirs in zip(distro, gloo, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert gloo[0]["losses"][-1] < gloo[0]["losses"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_hold_one_reference_and_their_mean_is_the_same(kind: str) -> None:
    ran = run(4, _train, kind, True)
    by_rank = dict(enumerate(ran))
    for rank, own in by_rank.items():
        stats = own["stats"]
        assert own["ranks"] == [rank % 2, rank % 2 + 2]
        assert stats["exchanges"] == 7
        assert [module["mode"] for module in stats["modules"]] == ["weights"]
        other = by_rank[(rank + 2) % 4]
        assert stats["reference_checksum"] == other["stats"]["reference_checksum"]
        assert torch.equal(own["averaged"], other["averaged"])
        assert not torch.equal(own["weights"], other["weights"])
        assert own["losses"][-1] < own["losses"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_between_steps_changes_nothing(kind: str) -> None:
    plain = run(4, _train, kind, True)
    evaluated = run(4, _train, kind, True, True)
    for left, right in zip(plain, evaluated, strict=True):
        assert left["losses"] == right["losses"]


def _accumulate(rank: int, size: int, kind: str) -> int:
    module = _wrapped(kind)
    optimizer = torch.optim.AdamW(module.parameters())
    for x in batches(rank, 4):
        for last in (False, True):
            if kind == "fsdp2":
                module.set_requires_gradient_sync(last)
                context: Any = contextlib.nullcontext()
            else:
                context = contextlib.nullcontext() if last else module.no_sync()
            with context:
                module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return int(torch_distro.stats(_replicas_of(module))["exchanges"])


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_are_one_exchange_a_step(kind: str) -> None:
    assert run(4, _accumulate, kind) == [3, 3, 3, 3]


def _payload(rank: int, size: int, kind: str) -> float:
    module = _wrapped(kind, width=50_000)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for x in batches(rank, 3):
        _step(module, optimizer, x)
    stats = torch_distro.stats(_replicas_of(module))
    return float(stats["gradient_bytes"] / 2 / stats["payload_bytes_sent"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_payload_is_that_of_the_shards(kind: str) -> None:
    for ratio in run(4, _payload, kind):
        assert ratio >= 857  # against bf16


def _dense(rank: int, size: int, kind: str) -> dict[str, Any]:
    module = _wrapped(kind)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = [_step(module, optimizer, x) for x in batches(rank, 4)]
    return {"losses": losses, "weights": _local(module)}


@pytest.mark.parametrize("kind", KINDS)
def test_dense_mode_equals_gloo_bit_for_bit(kind: str) -> None:
    gloo = run(4, _dense, kind, backend="gloo")
    distro = run(4, _dense, kind, env={"DISTRO_MODE": "dense"})
    for ours, theirs in zip(distro, gloo, strict=True):
        assert ours["losses"] == theirs["losses"]
        assert torch.equal(ours["weights"], theirs["weights"])
