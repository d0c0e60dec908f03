"""Hybrid sharding (HSDP) on FSDP1 and FSDP2: replicas of shards are exchanged in weights mode."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_distro
from hybrid import (
    KINDS,
    check_equals_gloo,
    local,
    modes_of,
    net,
    replicas_of,
    shard,
    step,
)
from models import batches
from ranks import run
from torch import nn
from torch.distributed.tensor import DTensor


def _plain(kind: str) -> Any:  # noqa: ANN401
    return shard(kind, net())


@pytest.mark.parametrize("kind", KINDS)
def test_everything_sent_at_once_by_sgd_is_dense_training(kind: str) -> None:
    check_equals_gloo(kind, _plain)


def _adamw(rank: int, size: int, kind: str, evaluate: bool = False) -> dict[str, Any]:
    module = _plain(kind)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for x in batches(rank, 8):
        if evaluate:
            with torch.no_grad():
                module(x)
        losses.append(step(module, optimizer, x))
    replicas = replicas_of(module)
    result = {
        "losses": losses,
        "weights": local(module),
        "stats": torch_distro.stats(replicas),
        "ranks": dist.get_process_group_ranks(replicas),
    }
    torch_distro.average(module)
    return result | {"averaged": local(module)}


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_hold_one_reference_and_their_mean_is_the_same(kind: str) -> None:
    ran = run(4, _adamw, kind)
    for rank, own in enumerate(ran):
        stats = own["stats"]
        assert own["ranks"] == [rank % 2, rank % 2 + 2]
        assert stats["exchanges"] == 7
        assert [module["mode"] for module in stats["modules"]] == ["weights"]
        other = ran[(rank + 2) % 4]
        assert stats["reference_checksum"] == other["stats"]["reference_checksum"]
        assert torch.equal(own["averaged"], other["averaged"])
        assert not torch.equal(own["weights"], other["weights"])
        assert own["losses"][-1] < own["losses"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_between_steps_changes_nothing(kind: str) -> None:
    plain = run(4, _adamw, kind)
    evaluated = run(4, _adamw, kind, True)
    for left, right in zip(plain, evaluated, strict=True):
        assert left["losses"] == right["losses"]


def _accumulate(rank: int, size: int, kind: str, all_reduce_only: bool) -> int:
    module = _plain(kind)
    optimizer = torch.optim.AdamW(module.parameters())
    for x in batches(rank, 4):
        for last in (False, True):
            context: Any = contextlib.nullcontext()
            if all_reduce_only:
                module.set_requires_all_reduce(last)
            elif kind == "fsdp2":
                module.set_requires_gradient_sync(last)
            elif not last:
                context = module.no_sync()
            with context:
                module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return int(torch_distro.stats(replicas_of(module))["exchanges"])


@pytest.mark.parametrize(
    ("kind", "all_reduce_only"), [("fsdp1", False), ("fsdp2", False), ("fsdp2", True)]
)
def test_accumulated_gradients_are_one_exchange_a_step(kind: str, all_reduce_only: bool) -> None:
    assert run(4, _accumulate, kind, all_reduce_only) == [3, 3, 3, 3]


def _gradients(rank: int, size: int, kind: str, accumulate: bool) -> torch.Tensor:
    module = _plain(kind)
    first, second = batches(rank, 2)
    if accumulate:
        context: Any = contextlib.nullcontext() if kind == "fsdp2" else module.no_sync()
        if kind == "fsdp2":
            module.set_requires_gradient_sync(False)
        with context:
            module(first).square().sum().backward()
        if kind == "fsdp2":
            module.set_requires_gradient_sync(True)
        module(second).square().sum().backward()
    else:
        module(torch.cat([first, second])).square().sum().backward()
    grads = [p.grad for p in module.parameters()]
    parts = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
    return torch.cat([part.reshape(-1) for part in parts if part is not None])


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_are_those_of_the_whole_batch(kind: str) -> None:
    parts = run(4, _gradients, kind, True)
    whole = run(4, _gradients, kind, False)
    for left, right in zip(parts, whole, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def _clip(rank: int, size: int, kind: str) -> tuple[float, float]:
    module = _plain(kind)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for x in batches(rank, 3):
        optimizer.zero_grad()
        (10 * module(x).square().sum()).backward()
        if kind == "fsdp1":
            norm = module.clip_grad_norm_(0.5)
        else:
            whole: Any = nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            norm = whole.full_tensor()
        optimizer.step()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    parts = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
    assert modes_of(module) == ["weights"]
    return norm.item(), sum(part.double().square().sum().item() for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_clipped_norm_is_that_of_a_replicas_whole_gradient(kind: str) -> None:
    ran = run(4, _clip, kind)
    for ranks in ([0, 1], [2, 3]):  # a replica each
        norms, squares = zip(*(ran[rank] for rank in ranks), strict=True)
        assert norms[0] == norms[1] > 0.5
        assert sum(squares) ** 0.5 == pytest.approx(0.5, rel=1e-3)
    assert ran[0][0] != ran[2][0]


def _payload(rank: int, size: int, kind: str) -> float:
    module = shard(kind, net(50_000))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for x in batches(rank, 3):
        step(module, optimizer, x)
    stats = torch_distro.stats(replicas_of(module))
    return float(stats["gradient_bytes"] / 2 / stats["payload_bytes_sent"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_payload_is_that_of_the_shards(kind: str) -> None:
    for ratio in run(4, _payload, kind):
        assert ratio >= 857  # against bf16


def _dense(rank: int, size: int, kind: str) -> dict[str, Any]:
    module = _plain(kind)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = [step(module, optimizer, x) for x in batches(rank, 4)]
    return {"losses": losses, "weights": local(module)}


@pytest.mark.parametrize("kind", KINDS)
def test_dense_mode_equals_gloo_bit_for_bit(kind: str) -> None:
    gloo = run(4, _dense, kind, backend="gloo")
    distro = run(4, _dense, kind, env={"DISTRO_MODE": "dense"})
    for ours, theirs in zip(distro, gloo, strict=True):
        assert ours["losses"] == theirs["losses"]
        assert torch.equal(ours["weights"], theirs["weights"])
