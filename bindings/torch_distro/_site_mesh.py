"""Fully sharded scripts over sites (DISTRO_SITE): shards within each site, replicas between them.

A script that shards over the whole world gathers all weights over it at each forward, and nothing
of that can be compressed away. Where the world has sites it gets hybrid sharding (HSDP) in its
place, without a change: by the mesh that FSDP2 makes where it is given none, and by the groups that
FSDP1 takes where it is given none.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from torch_distro._groups import backends_of

_HYBRID_OF = {
    None: ShardingStrategy.HYBRID_SHARD,
    ShardingStrategy.FULL_SHARD: ShardingStrategy.HYBRID_SHARD,
    ShardingStrategy.SHARD_GRAD_OP: ShardingStrategy._HYBRID_SHARD_ZERO2,
}

# By default group: its mesh of sites, by device type. One for all modules, as FSDP wants it.
_meshes: weakref.WeakKeyDictionary[Any, dict[str, DeviceMesh]] = weakref.WeakKeyDictionary()


def _mesh(world: dist.ProcessGroup, device_type: str) -> DeviceMesh | None:
    """Sites x ranks of a site; None where a full shard over `world` stays what it is.

    Collective the first time.

    Raises:
        ValueError: the sites have different numbers of ranks.
    """
    backends = backends_of(world)
    if not backends:
        return None
    group = backends[0].group
    sites: list[list[int]] = group.sites
    largest = max(len(ranks) for ranks in sites)
    if largest == 1 or len(sites) == 1 or group.mode == "dense":
        return None
    if any(len(ranks) != largest for ranks in sites):
        sizes = ", ".join(f"ranks {ranks}" for ranks in sites)
        raise ValueError(
            "a model that is sharded over sites (DISTRO_SITE) needs sites of one size, for each "
            f"site holds all of it in as many shards; these are: {sizes}. Give each site as many "
            "ranks, or FSDP a mesh or group of its own, or unset DISTRO_SITE"
        )
    meshes = _meshes.setdefault(world, {})
    if device_type not in meshes:
        meshes[device_type] = DeviceMesh(
            device_type, torch.tensor(sites), mesh_dim_names=("replicate", "shard")
        )
        if group.rank == 0:
            group.log(
                "warning",
                f"FSDP over all ranks: sharded over the {largest} ranks of each of {len(sites)} "
                "sites, and exchanged between them (DISTRO_SITE)",
            )
    return meshes[device_type]


def _wrap_default_mesh(original: Callable[[], DeviceMesh]) -> Callable[[], DeviceMesh]:
    """What FSDP2 asks where it is given no mesh."""

    @functools.wraps(original)
    def default_mesh() -> DeviceMesh:
        mesh = original()
        world = dist.group.WORLD
        assert world is not None
        return _mesh(world, mesh.device_type) or mesh

    return default_mesh


def _wrap_fsdp1_init(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(  # noqa: N807
        self: FullyShardedDataParallel,
        module: Any,  # noqa: ANN401
        process_group: Any = None,  # noqa: ANN401
        sharding_strategy: ShardingStrategy | None = None,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        if kwargs.get("device_mesh") is None:
            process_group, sharding_strategy = _over_sites(process_group, sharding_strategy)
        original(self, module, process_group, sharding_strategy, *args, **kwargs)

    return __init__


def _over_sites(
    process_group: Any,  # noqa: ANN401
    sharding_strategy: ShardingStrategy | None,
) -> tuple[Any, ShardingStrategy | None]:
    """What FSDP1 is to be given in place of these arguments."""
    world = dist.group.WORLD
    if world is None:
        return process_group, sharding_strategy
    # A module below one that is over sites inherits its groups, but may have its own strategy.
    made = _meshes.get(world, {}).get("cpu")
    inherited = (
        isinstance(process_group, tuple)
        and made is not None
        and (process_group == (made.get_group("shard"), made.get_group("replicate")))
    )
    if not inherited and process_group is not None and process_group is not world:
        return process_group, sharding_strategy
    if sharding_strategy == ShardingStrategy.NO_SHARD:
        return None if inherited else process_group, sharding_strategy
    # FSDP1 takes groups only, which serve every device: that of the mesh does not matter.
    mesh = _mesh(world, "cpu") if sharding_strategy in _HYBRID_OF else None
    if mesh is None:
        return process_group, sharding_strategy
    groups = (mesh.get_group("shard"), mesh.get_group("replicate"))
    return groups, _HYBRID_OF[sharding_strategy]


@functools.cache
def install() -> None:
    """Wrap what must be wrapped, once a process. What this torch lacks is left alone."""
    init = FullyShardedDataParallel.__init__
    FullyShardedDataParallel.__init__ = _wrap_fsdp1_init(init)  # type: ignore[method-assign]
    try:
        from torch.distributed.fsdp._fully_shard import _fully_shard as fsdp2

        default_mesh = fsdp2._init_default_mesh
    except (ImportError, AttributeError):
        return  # private: fully_shard without a mesh stays exact
    fsdp2._init_default_mesh = _wrap_default_mesh(default_mesh)  # type: ignore[assignment]
