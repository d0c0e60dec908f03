"""Sharded modules: they stay exact, and a line in the log says why and what would help.

FSDP gathers the weights at each forward, as many bytes as the gradients have: nothing is gained by
compressing the latter. The exception are replicas (NO_SHARD, hybrid sharding) in modes ef and demo.
Both kinds of FSDP are noted at the root module's first forward, when it is known which module is
the root.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from torch_distro._attachment import add_record
from torch_distro._groups import backends_of


def _note(
    module: nn.Module, shard: dist.ProcessGroup | None, replicate: dist.ProcessGroup | None
) -> None:
    """A root module whose parameters lie over `shard`, in replicas over `replicate`."""
    replicas = backends_of(replicate) if replicate is not None else []
    backends = replicas or (backends_of(shard) if shard is not None else [])
    if not backends:
        return
    group = backends[0].group
    name = type(module).__name__.removeprefix("FSDP")
    if replicas and group.exchanges_gradients:
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
    elif replicate is not None:
        reason = (
            f"hybrid sharding, over {shard.size()} ranks in {replicate.size()} replicas: "
            "compression between replicas is not available yet"
        )
    else:
        reason = (
            f"sharded over {shard.size()} ranks: gathering the weights moves as much as the "
            "gradients would. Compression needs replicas: hybrid sharding (HSDP) by a mesh of two "
            "dimensions, or by DISTRO_SITE, once they are available"
        )
    add_record(group, name, "exact", reason)
    level = "info" if group.mode == "dense" else "warning"
    group.log(level, f"module {name}: exact, nothing is compressed ({reason})")


def _wrap_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of FSDP1's wrapper, which knows from its first forward on whether it is the root."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the module's own
        first = self._is_root is None
        result = original(self, *args, **kwargs)
        if first and self._is_root:
            if self.sharding_strategy == ShardingStrategy.NO_SHARD:
                _note(self.module, None, self.process_group)
            else:
                _note(self.module, self.process_group, getattr(self, "_inter_node_pg", None))
        return result

    return forward


def _wrap_lazy_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of FSDP2's state, called at each forward of a root and idle after the first."""

    @functools.wraps(original)
    def lazy_init(self: Any) -> None:  # noqa: ANN401
        first = self._is_root is None
        original(self)
        if first and self._is_root:
            mesh = _mesh_of(self)
            shard = getattr(mesh, "shard_process_group", None)
            if shard is not None:
                replicate = getattr(mesh, "replicate_process_group", None)
                _note(self._modules[0], shard, replicate)

    return lazy_init


def _mesh_of(root: Any) -> Any:  # noqa: ANN401 - private types of FSDP2
    """How the first sharded parameters of a root are laid out over the ranks."""
    for state in root._state_ctx.all_states:
        # One group of parameters a state up to 2.12, several in later torch.
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for parameters in groups:
            if parameters is not None:
                return parameters.mesh_info
    return None


@functools.cache
def install() -> None:
    """Wrap what must be wrapped, once a process. What this torch lacks is left alone."""
    forward = FullyShardedDataParallel.forward
    FullyShardedDataParallel.forward = _wrap_forward(forward)  # type: ignore[method-assign]
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

        original = FSDPState._lazy_init
    except (ImportError, AttributeError):
        return  # private: modules stay exact all the same, without the line that says so
    FSDPState._lazy_init = _wrap_lazy_init(original)  # type: ignore[method-assign]
