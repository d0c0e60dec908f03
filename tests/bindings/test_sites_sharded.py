"""Scripts that shard over all ranks, unchanged, where DISTRO_SITE makes sites of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_distro
from hybrid import EVERYTHING, KINDS, local, replicas_of, step
from models import batches
from ranks import fail, run
from test_sites import TWO_BY_TWO, sites
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy


def _sharded(kind: str, width: int = 250) -> Any:  # noqa: ANN401
    """As a script writes it that knows one place only."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, 20))
    if kind == "fsdp2":
        fully_shard(net[0])
        return fully_shard(net)
    kwargs: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
    net[0] = FullyShardedDataParallel(net[0], **kwargs)
    return FullyShardedDataParallel(net, **kwargs)


def _train(rank: int, size: int, kind: str, normalises: bool, width: int = 250) -> dict[str, Any]:
    module = _sharded(kind, width)
    optimizer: torch.optim.Optimizer
    if normalises:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    else:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = [step(module, optimizer, x) for x in batches(rank, 8)]
    result: dict[str, Any] = {"losses": losses, "shard": local(module)}
    if dist.get_backend() == "distro":
        result["world"] = torch_distro.stats()
        if len(torch_distro.stats()["modules"]) == 0:
            replicas = replicas_of(module)
            result["replicas"] = torch_distro.stats(replicas)
            result["ranks"] = dist.get_process_group_ranks(replicas)
        torch_distro.average(module)
    with torch.no_grad():
        result["after"] = module(batches(9, 1)[0]).square().mean().item()
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_sharded_within_sites_and_exchanged_between_them(kind: str) -> None:
    ran = run(4, _train, kind, True, env=TWO_BY_TWO)
    for rank, own in enumerate(ran):
        assert own["ranks"] == [rank % 2, rank % 2 + 2]
        assert [module["mode"] for module in own["replicas"]["modules"]] == ["weights"]
        assert own["replicas"]["exchanges"] == 7
        other = ran[(rank + 2) % 4]["replicas"]
        assert own["replicas"]["reference_checksum"] == other["reference_checksum"]
        assert own["losses"][-1] < own["losses"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_exchange_goes_between_sites(kind: str) -> None:
    for own in run(4, _train, kind, True, 50_000, env=TWO_BY_TWO):
        between = own["replicas"]
        assert between["gradient_bytes"] / 2 / between["payload_bytes_sent"] >= 857
        # Scalars and the first forward's checks; the weights are two million, 8 MB.
        assert own["world"]["exact_bytes"] + between["exact_bytes"] < 1000


@pytest.mark.parametrize("kind", KINDS)
def test_everything_sent_at_once_by_sgd_is_the_full_shard(kind: str) -> None:
    gloo = run(4, _train, kind, False, backend="gloo")
    distro = run(4, _train, kind, False, env=TWO_BY_TWO, options=EVERYTHING)
    for ours, theirs in zip(distro, gloo, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)


def _by_policy(rank: int, size: int, strategy: ShardingStrategy | None) -> dict[str, Any]:
    """FSDP1 by a policy that gives one layer a strategy of its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 250), nn.Tanh(), nn.Linear(250, 20))
    own = {"sharding_strategy": strategy} if strategy else True
    module = FullyShardedDataParallel(
        net,
        None,
        ShardingStrategy.FULL_SHARD,
        auto_wrap_policy=CustomPolicy(lambda layer: own if layer is net[2] else False),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = [step(module, optimizer, x) for x in batches(rank, 6)]
    if dist.get_backend() == "distro":
        torch_distro.average(module)
    with torch.no_grad():
        losses.append(module(batches(9, 1)[0]).square().mean().item())
    return {"losses": losses}


@pytest.mark.parametrize(
    "strategy", [None, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD]
)
def test_a_policy_may_give_modules_strategies_of_their_own(
    strategy: ShardingStrategy | None,
) -> None:
    gloo = run(4, _by_policy, strategy, backend="gloo")
    distro = run(4, _by_policy, strategy, env=TWO_BY_TWO, options=EVERYTHING)
    for ours, theirs in zip(distro, gloo, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_sites_of_different_sizes_are_an_error_that_says_what_to_do(kind: str) -> None:
    for error in fail(3, _train, kind, True, env=sites("a", "a", "b")):
        assert "sites of one size" in error.message
        assert "DISTRO_SITE" in error.message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", ["", "house"])
def test_without_sites_or_in_one_it_is_the_full_shard_exactly(kind: str, label: str) -> None:
    gloo = run(2, _train, kind, True, backend="gloo")
    distro = run(2, _train, kind, True, env={"DISTRO_SITE": label} if label else {})
    for ours, theirs in zip(distro, gloo, strict=True):
        assert ours["losses"] == theirs["losses"]
        assert torch.equal(ours["shard"], theirs["shard"])
        assert ours["after"] == theirs["after"]  # average() has nothing to do
        (module,) = ours["world"]["modules"]
        assert module["mode"] == "exact"
        assert ("DISTRO_SITE" in module["reason"] and "HSDP" in module["reason"]) != bool(label)


def _own_mesh(rank: int, size: int) -> torch.Tensor:
    mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    net: Any = fully_shard(nn.Linear(20, 20), mesh=mesh)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x in batches(rank, 4):
        step(net, optimizer, x)
    return local(net)


def test_replicas_of_one_site_are_reduced_exactly() -> None:
    gloo = run(2, _own_mesh, backend="gloo")
    for ours, theirs in zip(run(2, _own_mesh, env={"DISTRO_SITE": "a"}), gloo, strict=True):
        assert torch.equal(ours, theirs)


def test_replicas_of_which_some_share_a_site_are_averaged_in_it() -> None:
    """A mesh of the script's own, of four replicas in two sites."""
    ran = run(4, _replicas_in_sites, env=TWO_BY_TWO)
    assert torch.equal(ran[0], ran[1])
    assert torch.equal(ran[2], ran[3])
    assert not torch.equal(ran[0], ran[2])
    gloo = run(4, _replicas_in_sites, backend="gloo")
    distro = run(4, _replicas_in_sites, env=TWO_BY_TWO, options=EVERYTHING)
    for ours, theirs in zip(distro, gloo, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def _replicas_in_sites(rank: int, size: int) -> torch.Tensor:
    mesh = dist.init_device_mesh("cpu", (4, 1), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    net: Any = fully_shard(nn.Linear(20, 300), mesh=mesh)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x in batches(rank, 6):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    net(x)
    return local(net)
