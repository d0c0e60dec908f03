"""Modules sharded in replicas (HSDP), of both kinds of FSDP, for the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_distro
from models import batches
from ranks import run
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor

KINDS = ["fsdp1", "fsdp2"]
EVERYTHING = {"k": 4096, "value_bits": 32, "delay": 0}


def grid(shard: int = 2) -> DeviceMesh:
    """Two replicas."""
    return init_device_mesh("cpu", (2, shard), mesh_dim_names=("replicate", "shard"))


def net(width: int = 250) -> nn.Sequential:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, 20))


def shard(kind: str, module: nn.Module, **options: Any) -> Any:  # noqa: ANN401 - FSDP's own
    """`module` sharded over one half of four ranks, with a copy on the other half.

    Args:
        kind: of FSDP.
        module: its first child is sharded by itself in FSDP2.
        options: of FSDP; a mesh is made if none is given.
    """
    if "process_group" not in options:
        mesh = options.pop("mesh", None) or grid()
        options["mesh" if kind == "fsdp2" else "device_mesh"] = mesh
    if kind == "fsdp2":
        fully_shard(next(module.children()), **options)
        return fully_shard(module, **options)
    options.setdefault("use_orig_params", True)
    options.setdefault("sharding_strategy", ShardingStrategy.HYBRID_SHARD)
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **options)


def step(module: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    """A regression to a shifted input."""
    loss = (module(x).float() - x.roll(1, 1)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def local(module: nn.Module) -> torch.Tensor:
    """The shards of this rank, in one."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([part.detach().reshape(-1) for part in parts])


def replicas_of(module: nn.Module) -> Any:  # noqa: ANN401
    """The group of the ranks that hold the same shard."""
    from torch_distro._attach import owners_of

    (owner,) = owners_of(module)
    return owner.process_group


def modes_of(module: nn.Module) -> list[str]:
    """Of the modules of the replicas' group."""
    return [record["mode"] for record in torch_distro.stats(replicas_of(module))["modules"]]


def train_by_sgd(rank: int, size: int, kind: str, build: Callable[[str], Any]) -> dict[str, Any]:
    """Losses and weights of a module that `build` makes, and the mode it got."""
    module = build(kind)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    losses = [step(module, optimizer, x) for x in batches(rank, 6)]
    modes = modes_of(module) if dist.get_backend() == "distro" else []
    return {"losses": losses, "weights": local(module), "modes": modes}


def check_equals_gloo(
    kind: str,
    build: Callable[[str], Any],
    mode: str = "weights",
    rel: float = 1e-4,
    ranks: int = 4,
    train: Callable[..., dict[str, Any]] = train_by_sgd,
) -> list[dict[str, Any]]:
    """Everything sent at once by SGD is dense training, in exact mode bit for bit."""
    gloo = run(ranks, train, kind, build, backend="gloo")
    distro = run(ranks, train, kind, build, options=EVERYTHING)
    assert gloo[0]["losses"][-1] < gloo[0]["losses"][0]
    for ours, theirs in zip(distro, gloo, strict=True):
        assert ours["modes"] == [mode]
        if mode == "exact":
            assert ours["losses"] == theirs["losses"]
            assert torch.equal(ours["weights"], theirs["weights"])
        else:
            assert ours["losses"] == pytest.approx(theirs["losses"], rel=rel)
    return distro
