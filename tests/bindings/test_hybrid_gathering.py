"""When hybrid sharding gathers weights, and keeps them: they are the exchanged ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hybrid import check_equals_gloo, grid, net, shard
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, ShardingStrategy


def _kept(kind: str) -> Any:  # noqa: ANN401
    return shard(kind, net(), reshard_after_forward=False)


def _let_go(kind: str) -> Any:  # noqa: ANN401
    return shard(kind, net(), reshard_after_forward=True)


def _resharded_to_two(kind: str) -> Any:  # noqa: ANN401
    return shard(kind, net(), mesh=grid(4), reshard_after_forward=2)


@pytest.mark.parametrize(
    ("build", "ranks"), [(_kept, 4), (_let_go, 4), (_resharded_to_two, 8)], ids=["no", "yes", "2"]
)
def test_reshard_after_forward(build: Callable[[str], Any], ranks: int) -> None:
    check_equals_gloo("fsdp2", build, ranks=ranks)


class _Ahead(nn.Module):
    """Calls ``unshard()`` before the forward, to overlap the gather with other work."""

    def __init__(self, module: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.module.unshard(async_op=True)
        return self.module(x)


def _unsharded_ahead(kind: str) -> Any:  # noqa: ANN401
    return _Ahead(shard(kind, net()))


def test_weights_that_are_gathered_before_the_forward_are_the_exchanged_ones() -> None:
    check_equals_gloo("fsdp2", _unsharded_ahead)


def _offloaded(kind: str) -> Any:  # noqa: ANN401
    return shard(kind, net(), offload_policy=CPUOffloadPolicy(pin_memory=False))


def test_cpu_offload() -> None:
    check_equals_gloo("fsdp2", _offloaded)  # FSDP1 cannot offload without a GPU


def _zero2(kind: str) -> Any:  # noqa: ANN401
    return shard(kind, net(), sharding_strategy=ShardingStrategy._HYBRID_SHARD_ZERO2)


def test_weights_kept_from_forward_to_backward() -> None:
    check_equals_gloo("fsdp1", _zero2)


def _one_shard(kind: str) -> Any:  # noqa: ANN401
    mesh = init_device_mesh("cpu", (4, 1), mesh_dim_names=("replicate", "shard"))
    return shard(kind, net(), mesh=mesh)


def test_replicas_of_one_shard() -> None:
    check_equals_gloo("fsdp2", _one_shard)
