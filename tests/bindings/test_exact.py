"""What is no gradient of a wrapped module is exact: equal to gloo's, bit for bit."""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from models import batches, flat, train, wrapped
from ranks import run
from torch.nn.parallel import DistributedDataParallel


def _tensor(
    rank: int, shape: tuple[int, ...] = (5, 3), dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(rank)) * 10
    return values.to(dtype)


def _all_collectives(group: dist.ProcessGroup, rank: int, size: int) -> list[torch.Tensor]:
    """Results of every collective of the contract in one group."""
    results = []
    for dtype in (torch.float32, torch.float64, torch.int64):
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT):
            x = _tensor(rank, dtype=dtype)
            dist.all_reduce(x, op, group=group)
            results.append(x)
    for dtype in (torch.bfloat16, torch.float16):
        x = _tensor(rank, dtype=dtype)
        dist.all_reduce(x, group=group)
        results.append(x)
    x = _tensor(rank)
    dist.broadcast(x, src=size - 1, group=group)
    results.append(x)
    x = _tensor(rank)
    dist.reduce(x, dst=0, group=group)
    results += [x] if rank == 0 else []
    gathered = [torch.empty(5, 3) for _ in range(size)]
    dist.all_gather(gathered, _tensor(rank), group=group)
    results += gathered
    flat_gathered = torch.empty(5 * size, 3)
    dist.all_gather_into_tensor(flat_gathered, _tensor(rank), group=group)
    results.append(flat_gathered)
    scattered = torch.empty(5, 3)
    dist.reduce_scatter(scattered, [_tensor(rank + 10 * i) for i in range(size)], group=group)
    results.append(scattered)
    scattered = torch.empty(5, 3)
    dist.reduce_scatter_tensor(scattered, _tensor(rank, (5 * size, 3)), group=group)
    results.append(scattered)
    root = [torch.empty(5, 3) for _ in range(size)] if rank == 0 else None
    dist.gather(_tensor(rank), root, dst=0, group=group)
    results += root or []
    part = torch.empty(5, 3)
    dist.scatter(part, [_tensor(i) for i in range(size)] if rank == 1 else None, src=1, group=group)
    results.append(part)
    exchanged = torch.empty(size, 3)
    dist.all_to_all_single(exchanged, _tensor(rank, (size, 3)), group=group)
    results.append(exchanged)
    other = torch.empty(5, 3)
    if rank == 0:
        dist.send(_tensor(7), dst=1, group=group)
        dist.recv(other, src=1, group=group)
    elif rank == 1:
        dist.recv(other, src=0, group=group)
        dist.send(_tensor(8), dst=0, group=group)
    results += [other] if rank < 2 else []
    dist.barrier(group=group)
    return results


def _same_as_gloo(rank: int, size: int) -> bool:
    gloo, world = dist.new_group(backend="gloo"), dist.group.WORLD
    assert isinstance(gloo, dist.ProcessGroup)
    assert world is not None
    expected = _all_collectives(gloo, rank, size)
    actual = _all_collectives(world, rank, size)
    assert len(expected) == len(actual)
    for left, right in zip(expected, actual, strict=True):
        assert torch.equal(left, right)
    return True


@pytest.mark.parametrize("size", [2, 4])
def test_collectives_equal_gloos_bit_for_bit(size: int) -> None:
    run(size, _same_as_gloo)


def _objects(rank: int, size: int) -> bool:
    everything: list[object] = [None] * size
    dist.all_gather_object(everything, {"rank": rank})
    assert everything == [{"rank": r} for r in range(size)]
    box: list[object] = [("from", rank)]
    dist.broadcast_object_list(box, src=1)
    assert box == [("from", 1)]
    gathered: list[object] | None = [None] * size if rank == 0 else None
    dist.gather_object(rank * rank, gathered, dst=0)
    assert rank != 0 or gathered == [r * r for r in range(size)]
    mine: list[object] = [None]
    dist.scatter_object_list(mine, [f"for {r}" for r in range(size)] if rank == 0 else None, src=0)
    assert mine == [f"for {rank}"]
    return True


def test_object_collectives() -> None:
    run(3, _objects)


def _asynchronous(rank: int, size: int) -> bool:
    x = torch.full((4,), float(rank))
    work = dist.all_reduce(x, async_op=True)
    assert work is not None
    assert work.wait()
    assert work.is_completed()
    assert x.tolist() == [sum(range(size))] * 4
    y = torch.full((4,), float(rank))
    future = dist.all_reduce(y, async_op=True).get_future()
    assert future.wait()[0].tolist() == [sum(range(size))] * 4
    tripled = dist.all_reduce(y, async_op=True).get_future().then(lambda f: f.value()[0] * 3)
    assert tripled.wait().tolist() == [3 * size * sum(range(size))] * 4
    return True


def test_async_op_and_futures() -> None:
    run(2, _asynchronous)


def _average(rank: int, size: int) -> bool:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.full((3,), float(rank), dtype=dtype)
        dist.all_reduce(x, dist.ReduceOp.AVG)
        assert x.tolist() == [sum(range(size)) / size] * 3
    with torch.inference_mode():  # as metrics are averaged in a validation
        x = torch.full((3,), float(rank))
        dist.all_reduce(x, dist.ReduceOp.AVG)
        assert x.tolist() == [sum(range(size)) / size] * 3
    whole = torch.tensor([10 * rank, -3])
    dist.all_reduce(whole, dist.ReduceOp.AVG)
    assert whole.tolist() == [5, -3]
    out = torch.empty(2)
    dist.reduce_scatter_tensor(out, torch.full((2 * size,), float(rank)), dist.ReduceOp.AVG)
    assert out.tolist() == [sum(range(size)) / size] * 2
    return True


def test_the_average_is_ours_for_every_dtype() -> None:
    run(2, _average)


def _late(rank: int, size: int) -> float:
    if rank == 1:
        time.sleep(6)
        return 0.0
    start = time.monotonic()
    try:
        dist.all_reduce(torch.zeros(3))
    except dist.DistBackendError:
        return time.monotonic() - start
    raise AssertionError("no error")


def test_a_collective_that_a_rank_does_not_join_times_out() -> None:
    assert run(2, _late, timeout=2)[0] < 5


def _dense_ddp(rank: int, size: int, backend: str, options: dict[str, bool]) -> torch.Tensor:
    group = dist.group.WORLD if backend == "distro" else dist.new_group(backend=backend)
    module = wrapped(process_group=group, **options)
    assert isinstance(module, DistributedDataParallel)
    train(module, torch.optim.AdamW(module.parameters(), lr=1e-2), batches(rank, 10))
    return flat(module)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"static_graph": True},
    ],
)
def test_dense_mode_trains_ddp_as_gloo_does_bit_for_bit(options: dict[str, bool]) -> None:
    call: Callable[..., list[torch.Tensor]] = functools.partial(
        run, 2, _dense_ddp, env={"DISTRO_MODE": "dense"}
    )
    distro = call("distro", options)
    gloo = call("gloo", options)
    assert torch.equal(distro[0], distro[1])
    assert torch.equal(distro[0], gloo[0])


def _unequal(rank: int, size: int) -> bool:
    if rank == 0:
        dist.monitored_barrier(timeout=datetime.timedelta(seconds=1))
    else:
        time.sleep(3)
    return True


def test_monitored_barrier_names_the_missing_rank() -> None:
    errors = fail_some(_unequal)
    assert "1" in errors[0].message


def fail_some(function: Callable[..., object]) -> list:
    from ranks import RankError, launch

    return [outcome for outcome in launch(2, function) if isinstance(outcome, RankError)]
