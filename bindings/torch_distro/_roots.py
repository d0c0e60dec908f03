"""Root modules of FSDP that have begun, and what the log says of those that stay exact."""

from __future__ import annotations

import weakref
from typing import Any

import torch.distributed as dist
from torch import nn

from torch_distro._attachment import add_record
from torch_distro._groups import backends_of
from torch_distro._replicas import Replicas

# By root that has begun (FSDP1's wrapper, FSDP2's state): its attachment, if it has replicas.
roots: weakref.WeakKeyDictionary[Any, Replicas | None] = weakref.WeakKeyDictionary()


def exchanges_weights(replicate: dist.ProcessGroup) -> bool:
    """Whether replicas over this group are to be exchanged in weights mode."""
    backends = backends_of(replicate)
    if not backends:
        return False
    group = backends[0].group
    return group.mode != "dense" and not group.exchanges_gradients and len(group.sites) > 1


def note_exact(
    module: nn.Module, shard: dist.ProcessGroup | None, replicate: dist.ProcessGroup | None
) -> None:
    """A root module whose parameters lie over `shard`, in replicas over `replicate`, is exact."""
    between = backends_of(replicate) if replicate is not None else []
    backends = between or (backends_of(shard) if shard is not None else [])
    if not backends:
        return
    group = backends[0].group
    name = name_of(module)
    if between and group.exchanges_gradients:
        reason = f"FSDP: the gradients of {group.world_size} replicas are compressed"
        add_record(group, name, group.mode, reason)
        group.log("info", f"module {name}: {group.mode} mode ({reason})")
        return
    if group.mode == "dense":
        reason = "DISTRO_MODE=dense"
    elif shard is None:
        reason = (
            f"FSDP of {group.world_size} replicas that are not sharded: compression of weights "
            "needs DistributedDataParallel"
        )
    elif replicate is not None and replicate.size() == 1:
        reason = f"hybrid sharding over {shard.size()} ranks, of one replica"
    elif len(group.sites) == 1:
        kind = "sharded over the" if replicate is None else "hybrid sharding over"
        reason = f"{kind} {group.world_size} ranks of one site"
    elif replicate is not None:
        reason = (
            f"hybrid sharding over {shard.size()} ranks in a model of which a part is sharded "
            "otherwise"
        )
    elif len(group.sites) < group.world_size:
        reason = (
            f"sharded over {shard.size()} ranks of several sites by a mesh or group of the "
            "script's own. DISTRO_SITE makes hybrid sharding (HSDP) of it where FSDP is given none"
        )
    else:
        reason = (
            f"sharded over {shard.size()} ranks: gathering the weights moves as much as the "
            "gradients would. Compression needs replicas: set DISTRO_SITE to the same label on the "
            "ranks of each place, or use hybrid sharding (HSDP) by a mesh of two dimensions"
        )
    add_record(group, name, "exact", reason)
    level = "info" if group.mode == "dense" or len(group.sites) == 1 else "warning"
    group.log(level, f"module {name}: exact, nothing is compressed ({reason})")


def name_of(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("FSDP")
