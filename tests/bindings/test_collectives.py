"""Operators, types and newer faces of the collectives, each against what it must compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from ranks import MINOR, run

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.uint8, torch.int8, torch.int32, torch.int64]
OPERATORS = ["SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"]


def _outcome(call: Callable[[], torch.Tensor]) -> torch.Tensor | type:
    """A result, or the type of the refusal."""
    try:
        return call()
    except (RuntimeError, TypeError, ValueError) as error:
        return type(error)


def _reduced(group: Any, dtype: torch.dtype, name: str, rank: int) -> torch.Tensor:  # noqa: ANN401
    x = torch.tensor([1 + rank, 3, 7 - rank, 0], dtype=torch.int64).to(dtype)
    dist.all_reduce(x, getattr(dist.ReduceOp, name), group=group)
    return x


def _operators(rank: int, size: int) -> bool:
    gloo = dist.new_group(backend="gloo")
    for dtype in [*FLOATS, *INTEGERS, torch.bool, torch.complex64]:
        for name in OPERATORS:
            theirs = _outcome(lambda d=dtype, n=name: _reduced(gloo, d, n, rank))  # type: ignore[misc]
            ours = _outcome(lambda d=dtype, n=name: _reduced(None, d, n, rank))  # type: ignore[misc]
            if isinstance(theirs, torch.Tensor):
                assert isinstance(ours, torch.Tensor), (dtype, name, ours)
                assert torch.equal(ours, theirs), (dtype, name)
            else:
                assert ours is theirs, (dtype, name)
    sparse = torch.sparse_coo_tensor(torch.tensor([[rank, 2]]), torch.tensor([1.0, 2.0]), (3,))
    dist.all_reduce(sparse)
    assert sparse.to_dense().tolist() == [1.0, 1.0, 4.0]
    return True


def test_every_operator_is_gloos_for_every_type() -> None:
    run(2, _operators)


def _averages(rank: int, size: int) -> bool:
    average = dist.ReduceOp.AVG
    for dtype in [*FLOATS, *INTEGERS, torch.int16]:
        high = 250 if dtype == torch.uint8 else 120  # the sum does not fit into 8 bits
        x = torch.tensor([high, 7 * rank, 0]).to(dtype)
        if dtype.is_signed:
            x[2] = -7 * rank
        mean = [high, 3.5, -3.5 if dtype.is_signed else 0]
        expected = mean if dtype in FLOATS else [int(value) for value in mean]  # toward zero
        y = x.clone()
        dist.all_reduce(y, average)
        assert y.tolist() == expected, dtype
        y = x.clone()
        dist.reduce(y, 1, average)
        assert rank != 1 or y.tolist() == expected, dtype
        y = torch.empty_like(x)
        dist.reduce_scatter_tensor(y, x.repeat(size), average)
        assert y.tolist() == expected, dtype
        y = torch.empty_like(x)
        dist.reduce_scatter(y, [x] * size, average)
        assert y.tolist() == expected, dtype
        many = [x.clone(), x.clone()]
        with dist._coalescing_manager():
            for y in many:
                dist.all_reduce(y, average)
        assert [y.tolist() for y in many] == [expected] * 2, dtype
        many = [torch.empty_like(x), torch.empty_like(x)]
        with dist._coalescing_manager():
            for y in many:
                dist.reduce_scatter_tensor(y, x.repeat(size), average)
        assert [y.tolist() for y in many] == [expected] * 2, dtype
    work: Any = dist.all_reduce(torch.tensor([3], dtype=torch.int32), average, async_op=True)
    assert work.get_future().wait()[0].dtype == torch.int32
    with pytest.raises(TypeError, match="average of bool"):
        dist.all_reduce(torch.tensor([True]), average)
    return True


def test_averages_of_every_type_in_every_reduction() -> None:
    run(2, _averages)


def _premultiplied(rank: int, size: int) -> bool:
    for factor in (0.5, torch.tensor([0.5])):
        op = dist._make_nccl_premul_sum(factor)  # type: ignore[attr-defined]
        for dtype in FLOATS:
            x = torch.tensor([2.0, 4.0 + 2 * rank], dtype=dtype)
            y = x.clone()
            dist.all_reduce(y, op)
            assert y.tolist() == [2.0, 5.0], dtype
            future = dist.all_reduce(x.clone(), op, async_op=True).get_future()
            assert future.wait()[0].tolist() == [2.0, 5.0]
            y = x.clone()
            dist.reduce(y, 0, op)
            assert rank != 0 or y.tolist() == [2.0, 5.0]
            y, both = torch.empty_like(x), x.repeat(size)
            dist.reduce_scatter_tensor(y, both, op)
            assert y.tolist() == [2.0, 5.0]
            assert torch.equal(both, x.repeat(size))  # the input is the caller's
            many = [torch.empty_like(x)]
            with dist._coalescing_manager():
                dist.reduce_scatter_tensor(many[0], both, op)
            assert many[0].tolist() == [2.0, 5.0]
        with pytest.raises(TypeError, match="floating-point"):
            dist.all_reduce(torch.tensor([1]), op)
    return True


def test_premultiplied_sums_with_scalar_and_tensor_factors() -> None:
    run(2, _premultiplied)


def _exchanges(rank: int, size: int) -> bool:
    # Uneven parts: rank r gets r + 1 elements from each.
    inputs = [torch.full((to + 1,), float(10 * rank + to)) for to in range(size)]
    outputs = [torch.empty(rank + 1) for _ in range(size)]
    dist.all_to_all(outputs, inputs)
    assert [x.tolist() for x in outputs] == [[10.0 * r + rank] * (rank + 1) for r in range(size)]
    one = torch.empty(size * (rank + 1))
    splits = list(range(1, size + 1))
    dist.all_to_all_single(one, torch.cat(inputs), [rank + 1] * size, splits)
    assert torch.equal(one, torch.cat(outputs))
    received = torch.empty(2)
    operations = [
        dist.P2POp(dist.isend, torch.full((2,), float(rank)), (rank + 1) % size),
        dist.P2POp(dist.irecv, received, (rank - 1) % size),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert received.tolist() == [float((rank - 1) % size)] * 2
    if rank == 0:
        assert {dist.recv(torch.empty(1)) for _ in range(1, size)} == set(range(1, size))
    else:
        dist.send(torch.ones(1), 0)
    gathered = [torch.empty(size), torch.empty(2 * size)]
    with dist._coalescing_manager(async_ops=True) as together:
        dist.all_gather_into_tensor(gathered[0], torch.full((1,), float(rank)))
        dist.all_gather_into_tensor(gathered[1], torch.full((2,), float(rank)))
    together.wait()
    assert gathered[0].tolist() == [float(r) for r in range(size)]
    backend: Any = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    assert not backend.supports_coalescing
    return True


def test_all_to_all_batched_point_to_point_and_coalesced_gathers() -> None:
    run(3, _exchanges)


def _newer_names(rank: int, size: int) -> bool:
    c10d: Any = torch._C._distributed_c10d
    x = torch.tensor([float(rank), 1.0])
    backend: Any = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    out = torch.empty(2 * size)
    backend.all_gather_single(out, x, c10d.AllgatherOptions()).wait()
    assert out.tolist() == [value for r in range(size) for value in (float(r), 1.0)]
    part = torch.empty(2)
    backend.reduce_scatter_single(part, x.repeat(size), c10d.ReduceScatterOptions()).wait()
    assert part.tolist() == [sum(range(size)), size]
    swapped = torch.empty(2)
    backend.all_to_all_single(swapped, x, [1] * size, [1] * size, c10d.AllToAllOptions()).wait()
    assert swapped.tolist() == ([0.0, 1.0] if rank == 0 else [1.0, 1.0])
    root = torch.empty(size, 2) if rank == 0 else None
    dist.gather_single(x, root, dst=0)  # type: ignore[attr-defined]
    assert root is None or root.tolist() == [[float(r), 1.0] for r in range(size)]
    return True


needs_newer_names = pytest.mark.skipif(
    not hasattr(dist, "gather_single"), reason="names of later torches"
)


@needs_newer_names
def test_the_newer_names_forward_to_the_older() -> None:
    run(2, _newer_names)


def _functional(rank: int, size: int) -> bool:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    group = dist.group.WORLD
    assert group is not None
    x = torch.tensor([1.0, float(rank)])
    assert functional.all_reduce(x, "sum", group).tolist() == [2.0, 1.0]
    assert functional.all_reduce(x, "avg", group).tolist() == [1.0, 0.5]
    assert functional.all_gather_tensor(x, 0, group).tolist() == [1.0, 0.0, 1.0, 1.0]
    assert functional.reduce_scatter_tensor(x, "sum", 0, group).tolist() == [[2.0], [1.0]][rank]
    both = functional.all_reduce_coalesced([x, x * 2], "sum", group)
    assert [y.tolist() for y in both] == [[2.0, 1.0], [4.0, 2.0]]
    mesh = dist.init_device_mesh("cpu", (size,))
    whole = torch.arange(16.0).reshape(4, 4)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    product = sharded @ distribute_tensor(whole, mesh, [Replicate()])
    assert isinstance(product, DTensor)
    assert torch.equal(product.full_tensor(), whole @ whole)
    assert torch.equal(sharded.redistribute(mesh, [Shard(1)]).full_tensor(), whole)
    total: Any = sharded.sum()
    assert total.full_tensor().item() == whole.sum().item()
    return True


def test_functional_collectives_and_dtensor() -> None:
    run(2, _functional)


def test_they_work_under_detail_debugging() -> None:
    detail = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    if MINOR >= (2, 15):  # older checking wrappers have no coalesced gather, with any backend
        run(2, _functional, env=detail)
    run(3, _exchanges_under_detail, env=detail)


def _exchanges_under_detail(rank: int, size: int) -> bool:
    from models import batches, train, wrapped

    x = torch.tensor([2.0 + rank])
    dist.all_reduce(x, dist.ReduceOp.AVG)
    assert x.item() == 3.0
    module = wrapped()
    train(module, torch.optim.AdamW(module.parameters()), batches(rank, 3))
    dist.barrier()
    return True
