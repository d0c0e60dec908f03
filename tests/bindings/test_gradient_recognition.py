"""Modes ef and demo: what is a gradient reduction is recognised, and all else stays exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
import torch_distro
from gradient_models import (
    DENSE,
    backward,
    beside_gloo,
    data,
    model,
    reductions,
    same_everywhere,
    steps,
    weights,
)
from ranks import run
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

COMPRESSING = {"mode": "ef", "k": 6}


class _SumInBackward(torch.autograd.Function):
    """What SyncBatchNorm and tensor parallelism do: a collective of their own inside backward."""

    @staticmethod
    def forward(_context: Any, x: torch.Tensor, _group: Any) -> torch.Tensor:  # noqa: ANN401
        _context.group = _group
        return x.clone()

    @staticmethod
    def backward(_context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401
        total = gradient.clone()
        dist.all_reduce(total, group=_context.group)
        return total, None


def _own_functions(rank: int, group: dist.ProcessGroup) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    results = []
    for function in (
        lambda x: _SumInBackward.apply(x, group),
        lambda x: differentiable.all_reduce(x, group=group),
        lambda x: torch.stack(list(differentiable.all_gather(x, group=group))),
        lambda x: differentiable.reduce_scatter(torch.empty(4500), list(x.chunk(2)), group=group),
    ):
        x = torch.randn(9000, generator=generator, requires_grad=True)
        function(x * 2).square().sum().backward()
        results.append(x.grad)
    # Outside backward, by hand, of every operator and dtype.
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64):
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
            y = (torch.randn(9000, generator=generator) * 10).to(dtype)
            dist.all_reduce(y, op, group=group)
            results.append(y)
    works = [(torch.randn(5000 + i, generator=generator)) for i in range(5)]
    pending = [dist.all_reduce(z, group=group, async_op=True) for z in works]
    for work in reversed(pending):
        work.wait()
    results += works
    average = torch.randn(9000, generator=generator)
    dist.all_reduce(average, dist.ReduceOp.SUM, group=group)
    return [*results, average / 2]  # type: ignore[list-item]


def _exact(rank: int, size: int) -> bool:
    world, gloo = dist.group.WORLD, dist.new_group(backend="gloo")
    assert world is not None
    assert isinstance(gloo, dist.ProcessGroup)
    with reductions(0):
        for own, expected in zip(
            _own_functions(rank, world), _own_functions(rank, gloo), strict=True
        ):
            assert torch.equal(own, expected)
        average = torch.full((9000,), float(rank))
        dist.all_reduce(average, dist.ReduceOp.AVG)
        assert average.tolist() == [0.5] * 9000

        # Gradients reduced by hand after backward cannot be told from anything else.
        by_hand = model()
        backward(by_hand, data(rank, 0))
        for parameter in by_hand.parameters():
            total = parameter.grad.clone()  # type: ignore[union-attr]
            dist.all_reduce(total, group=gloo)
            dist.all_reduce(parameter.grad)  # type: ignore[arg-type]
            assert torch.equal(parameter.grad, total)  # type: ignore[arg-type]
        torch_distro.average(by_hand)
    return True


def test_all_but_gradient_reductions_equals_gloo_bit_for_bit() -> None:
    run(2, _exact, options=COMPRESSING)


def _own_hooks(rank: int, size: int) -> list[str]:
    def hook(group, bucket):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        return allreduce_hook(group, bucket)

    def power(module: DistributedDataParallel, rank: int) -> None:
        state = PowerSGDState(
            module.process_group, matrix_approximation_rank=2, start_powerSGD_iter=2
        )
        module.register_comm_hook(state, powerSGD_hook)
        steps(module, rank, 4)

    def user(module: DistributedDataParallel, rank: int) -> None:
        module.register_comm_hook(module.process_group, hook)
        steps(module, rank)

    with reductions(0):
        for training in (user, power):
            distro, gloo = beside_gloo(rank, training)
            assert torch.equal(distro, gloo)
    return [entry["reason"] for entry in torch_distro.stats()["modules"]]


def test_a_script_with_a_communication_hook_of_its_own_is_exact() -> None:
    for reasons in run(2, _own_hooks, options=COMPRESSING):
        assert reasons == ["the script has a communication hook of its own"] * 2


def _inside_and_outside(rank: int, size: int) -> bool:
    for step in range(3):
        one = torch.nn.Linear(100, 80, bias=False)
        generator = torch.Generator().manual_seed(10 * step + rank)
        x = torch.randn(4, 100, generator=generator)
        if rank == 0:  # this rank reduces in the middle of backward, where a gradient is ready
            one.weight.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
        one(x).sum().backward()
        own = x.sum(0).expand(80, 100).clone()
        if rank != 0:  # and these after it
            dist.all_reduce(one.weight.grad)  # type: ignore[arg-type]
        gathered = [torch.empty_like(own) for _ in range(size)]
        dist.all_gather(gathered, own)
        torch.testing.assert_close(one.weight.grad, sum(gathered), rtol=0, atol=1e-4)
        assert same_everywhere(one.weight.grad)  # type: ignore[arg-type]
    assert torch_distro.stats()["reductions"] == 3
    return True


def test_a_reduction_inside_backward_on_one_rank_and_outside_on_others_is_compressed_on_all() -> (
    None
):
    run(3, _inside_and_outside, options=DENSE)


def _fsdp1(rank: int, size: int) -> torch.Tensor:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    module = FullyShardedDataParallel(
        model(),
        sharding_strategy=ShardingStrategy.NO_SHARD,
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    steps(module, rank)
    return weights(module)


def _fsdp2(rank: int, size: int, shape: tuple[int, ...]) -> torch.Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = ("replicate", "shard")[-len(shape) :]
    module = model()
    fully_shard(module, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    steps(module, rank)
    return torch.cat([p.full_tensor().detach().double().flatten() for p in module.parameters()])  # type: ignore[attr-defined]


def _fsdp(rank: int, size: int, kind: str) -> tuple[torch.Tensor, int]:
    if kind == "NO_SHARD":
        result = _fsdp1(rank, size)
    else:
        result = _fsdp2(rank, size, (2, 1) if kind == "HSDP" else (2,))
    assert same_everywhere(result)
    made = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        if dist.get_backend(group) == "distro":
            made += torch_distro.stats(group)["reductions"]
    return result, made


@pytest.mark.parametrize(
    ("kind", "compressed", "exact"),
    [
        ("NO_SHARD", DENSE, None),
        ("HSDP", DENSE, None),
        ("full shard", {**DENSE, "reduce_scatter": "compress"}, DENSE),
    ],
)
def test_fsdp(kind: str, compressed: dict[str, Any], exact: dict[str, Any] | None) -> None:
    expected, made = run(2, _fsdp, kind, backend="gloo")[0]
    assert made == 0
    for result, made in run(2, _fsdp, kind, options=compressed):
        assert made >= 3
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    if exact:
        for result, made in run(2, _fsdp, kind, options=exact):
            assert made == 0
            assert torch.equal(result, expected)
