"""Collectives by way of host memory, as for tensors on a GPU without NCCL; here from the CPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from ranks import fail, run
from test_exact import _all_collectives
from torch_distro._extension import extension


def _stage() -> None:
    """Groups made from now on stage the CPU's tensors."""
    core: Any = extension()
    core.DeviceDispatch = functools.partial(core.DeviceDispatch, stage_host=True)


def _group() -> dist.ProcessGroup:
    group = dist.new_group(backend="distro")
    assert isinstance(group, dist.ProcessGroup)
    return group


def _staged_group() -> dist.ProcessGroup:
    _stage()
    return _group()


def _same_as_gloo(rank: int, size: int) -> bool:
    gloo, staged = dist.new_group(backend="gloo"), _staged_group()
    assert isinstance(gloo, dist.ProcessGroup)
    expected = _all_collectives(gloo, rank, size)
    actual = _all_collectives(staged, rank, size)
    assert len(expected) == len(actual)
    for left, right in zip(expected, actual, strict=True):
        assert torch.equal(left, right)

    # By future, in any order of waiting, and on tensors that do not lie in order.
    tensors = [torch.full((3, 4), float(rank + i)).t() for i in range(4)]
    works = [dist.all_reduce(tensor, group=staged, async_op=True) for tensor in tensors]
    for i in (2, 0, 3, 1):
        assert works[i].get_future().wait()[0].eq(sum(range(size)) + size * i).all()
        works[i].wait()
        assert works[i].is_completed()
        assert tensors[i].eq(sum(range(size)) + size * i).all()

    mean = torch.full((3,), float(rank))
    dist.all_reduce(mean, dist.ReduceOp.AVG, group=staged)
    assert mean.tolist() == [sum(range(size)) / size] * 3
    part = torch.empty(2)
    whole = torch.full((2 * size,), float(rank))
    dist.reduce_scatter_tensor(part, whole, dist.ReduceOp.AVG, group=staged)
    assert part.tolist() == [sum(range(size)) / size] * 2

    # Both directions at once between all pairs.
    received = [torch.zeros(100_000) for _ in range(size)]
    work = [
        dist.P2POp(dist.isend, torch.full((100_000,), float(rank)), other, group=staged)
        for other in range(size)
        if other != rank
    ] + [
        dist.P2POp(dist.irecv, received[other], other, group=staged)
        for other in range(size)
        if other != rank
    ]
    for one in dist.batch_isend_irecv(work):
        one.wait()
    for other in range(size):
        assert other == rank or received[other].eq(float(other)).all()

    sparse = torch.sparse_coo_tensor(torch.tensor([[rank]]), torch.ones(1), (size,))
    dist.all_reduce(sparse, group=staged)
    assert sparse.to_dense().tolist() == [1.0] * size
    return True


def test_staged_collectives_equal_gloos_bit_for_bit() -> None:
    run(3, _same_as_gloo)


def _mixed(rank: int, size: int) -> list[float]:
    """Rank 1 stages, rank 0 does not, in one group: as a rank with a GPU beside one without."""
    if rank == 1:
        _stage()
    group = _group()
    total = torch.full((5,), float(rank))
    for _ in range(20):
        dist.all_reduce(total, group=group)
        dist.broadcast(total, src=1, group=group)
    dist.barrier(group=group)
    return total.tolist()


def test_ranks_that_stage_meet_ranks_that_do_not() -> None:
    first, second = run(2, _mixed)
    assert first == second == [float(2**19)] * 5


def _late(rank: int, size: int) -> bool:
    group = _staged_group()
    if rank == 0:
        dist.all_reduce(torch.zeros(3), group=group)
    else:
        raise RuntimeError("rank 1 has its own troubles")
    return True


def test_an_error_of_the_host_backend_is_the_staged_collectives() -> None:
    errors = fail(2, _late, timeout=3)
    assert errors[0].kind == "DistBackendError"
