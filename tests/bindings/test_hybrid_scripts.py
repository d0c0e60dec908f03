"""What scripts do with hybrid sharding: each way of it against the same with Gloo.

Everything is sent at once and the optimizer is SGD, so that weights mode is dense training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hybrid import KINDS, check_equals_gloo, local, modes_of, net, shard
from models import batches
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecision,
    MixedPrecisionPolicy,
)
from torch.distributed.tensor import distribute_tensor


def _mesh_of_three(kind: str) -> Any:  # noqa: ANN401
    names = ("dp_replicate", "dp_shard", "tp")
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=names)
    return shard(kind, net(), mesh=mesh["dp_replicate", "dp_shard"])


def _mesh_by_ranks(kind: str) -> Any:  # noqa: ANN401
    ranks = torch.tensor([[0, 2], [1, 3]])
    return shard(kind, net(), mesh=DeviceMesh("cpu", ranks, mesh_dim_names=("outer", "inner")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [_mesh_of_three, _mesh_by_ranks])
def test_the_scripts_own_mesh_says_who_the_replicas_are(
    kind: str, build: Callable[[str], Any]
) -> None:
    check_equals_gloo(kind, build)


def _groups(kind: str) -> Any:  # noqa: ANN401
    shards = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    replicas = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    return shard(kind, net(), process_group=(shards[rank // 2], replicas[rank % 2]))


def test_groups_instead_of_a_mesh_are_recognised() -> None:
    check_equals_gloo("fsdp1", _groups)


def _half(kind: str) -> Any:  # noqa: ANN401
    options: dict[str, Any]
    if kind == "fsdp2":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options = {"mp_policy": policy}
    else:
        policy1 = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options = {"mixed_precision": policy1}
    return shard(kind, net(), **options)


def _half_reduced(kind: str) -> Any:  # noqa: ANN401
    options: dict[str, Any]
    if kind == "fsdp2":
        options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    else:
        policy = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
        options = {"mixed_precision": policy}
    return shard(kind, net(), **options)


def _half_weights(kind: str) -> Any:  # noqa: ANN401
    return shard(kind, net().to(torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [_half, _half_reduced])
def test_mixed_precision(kind: str, build: Callable[[str], Any]) -> None:
    for own in check_equals_gloo(kind, build, rel=2e-2):
        assert own["weights"].dtype == torch.float32


def _train_half(rank: int, size: int, kind: str, build: Callable[[str], Any]) -> dict[str, Any]:
    module = build(kind)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = []
    for x in batches(rank, 6, torch.bfloat16):
        loss = (module(x) - x.roll(1, 1)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    modes = modes_of(module) if dist.get_backend() == "distro" else []
    return {"losses": losses, "weights": local(module), "modes": modes}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_bf16(kind: str) -> None:
    check_equals_gloo(kind, _half_weights, rel=2e-2, train=_train_half)


def _compiled_blocks(kind: str) -> Any:  # noqa: ANN401
    module = net()
    module[0].compile(backend="aot_eager")
    return shard(kind, module)


def _compiled(kind: str) -> Any:  # noqa: ANN401
    return torch.compile(shard(kind, net()), backend="aot_eager")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [_compiled_blocks, _compiled])
def test_compiled_modules(kind: str, build: Callable[[str], Any]) -> None:
    check_equals_gloo(kind, build)


class Odd(nn.Module):
    """Tied and frozen parameters, and sizes that the ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 33)
        self.second = nn.Linear(33, 20)
        self.norm = nn.LayerNorm(20)
        self.tied = nn.Linear(20, 20, bias=False)
        self.tied_again = nn.Linear(20, 20, bias=False)
        self.tied_again.weight = self.tied.weight
        self.frozen = nn.Linear(20, 20)
        self.frozen.requires_grad_(False)
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.second(torch.tanh(self.first(x)))) * self.one
        return self.frozen(self.tied_again(torch.tanh(self.tied(x))))


def _odd(kind: str) -> Any:  # noqa: ANN401
    torch.manual_seed(0)
    return shard(kind, Odd())


@pytest.mark.parametrize("kind", KINDS)
def test_tied_frozen_and_uneven_parameters(kind: str) -> None:
    check_equals_gloo(kind, _odd)


def _flat_parameters(kind: str) -> Any:  # noqa: ANN401
    return shard(kind, net(), use_orig_params=False)


def test_flat_parameters() -> None:
    check_equals_gloo("fsdp1", _flat_parameters)


def _hook(gradient: torch.Tensor) -> None:
    gradient.mul_(0.5)


def _hooked(kind: str) -> Any:  # noqa: ANN401
    module = shard(kind, net())
    for part in (module, module[0]):
        part.set_all_reduce_hook(_hook)
    return module


def test_an_all_reduce_hook_of_the_scripts_own_is_respected() -> None:
    check_equals_gloo("fsdp2", _hooked, mode="exact")


def _from_meta(kind: str) -> Any:  # noqa: ANN401
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(20, 250), nn.Tanh(), nn.Linear(250, 20))
    if kind == "fsdp1":

        def fill(part: nn.Module) -> None:
            part.to_empty(device="cpu", recurse=False)
            if isinstance(part, nn.Linear):
                torch.manual_seed(part.in_features)
                part.reset_parameters()

        return shard(kind, module, param_init_fn=fill)
    module = shard(kind, module)
    module.to_empty(device="cpu")
    torch.manual_seed(0)
    for p in module.parameters():
        whole = 0.1 * torch.randn(p.shape)
        placed = distribute_tensor(whole, p.device_mesh, p.placements)
        p.data.to_local().copy_(placed.to_local())
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_modules_that_begin_on_the_meta_device(kind: str) -> None:
    check_equals_gloo(kind, _from_meta)
