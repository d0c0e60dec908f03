"""Exact collectives over the group's own transport: Options(exact="transport"), without gloo.

Runs what other tests run with gloo, and what only this can do. TEST_EXACT=transport makes all tests
of this folder run so.
"""

from __future__ import annotations

import datetime
import functools
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import test_collectives
import test_exact
import test_faults
import test_groups
import test_lifecycle
import test_sites
import test_timeouts
import torch
import torch.distributed as dist
import torch_distro
from models import adamw, batches, flat, train, wrapped
from ranks import fail, launch, run
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import fully_shard
from torch_distro import _inner

TRANSPORT = {"exact": "transport"}
DENSE = {**TRANSPORT, "mode": "dense"}


def _without_gloo(rank: int, size: int, function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401
    """`function` where nobody can make a Gloo, neither we nor torch, nor an NCCL."""

    class Refused:
        def __init__(self, *_: object, **__: object) -> None:
            raise AssertionError("something makes a Gloo, or an NCCL")

    distributed_c10d.ProcessGroupGloo = Refused  # type: ignore[assignment, misc]
    dist.ProcessGroupGloo = Refused  # type: ignore[assignment, misc]
    _inner._gloo = _inner._nccl = Refused  # type: ignore[assignment]
    group = dist.new_group(backend="distro")  # the world was there before
    assert group is not None
    return function(rank, size, *arguments)


def _run(size: int, function: Callable[..., Any], *arguments: Any, **given: Any) -> list[Any]:  # noqa: ANN401
    options = {**TRANSPORT, **given.pop("options", {})}
    return run(size, _without_gloo, function, *arguments, options=options, **given)


@pytest.mark.parametrize(
    ("size", "function"),
    [
        (3, test_exact._objects),
        (2, test_exact._asynchronous),
        (2, test_exact._average),
        (2, test_collectives._averages),
        (2, test_collectives._premultiplied),
        (3, test_collectives._exchanges),
        pytest.param(2, test_collectives._newer_names, marks=test_collectives.needs_newer_names),
        (2, test_collectives._functional),
        (4, test_groups._meshes),
        (3, test_lifecycle._several),
        (1, test_lifecycle._one),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_gloo_does_the_transport_does(size: int, function: Callable[..., Any]) -> None:
    _run(size, function)


def test_they_work_under_detail_debugging() -> None:
    detail = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    run(3, test_collectives._exchanges_under_detail, options=TRANSPORT, env=detail)


def test_results_and_refusals_of_two_ranks_are_gloos_bit_for_bit() -> None:
    run(2, test_exact._same_as_gloo, options=TRANSPORT)
    run(2, test_collectives._operators, options=TRANSPORT)


TYPES = [
    *test_collectives.FLOATS,
    *test_collectives.INTEGERS,
    *(torch.bool, torch.complex64, torch.complex128),
    *(torch.int16, torch.uint16, torch.uint32, torch.uint64),
]


def _values(rank: int, dtype: torch.dtype, elements: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    if dtype.is_complex or dtype.is_floating_point:
        return torch.randn(elements, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 100, (elements,), generator=generator).to(dtype)


def _in_order(dtype: torch.dtype, name: str, size: int, elements: int) -> torch.Tensor:
    """What the ranks' values are together, one rank after the other, 16 bits in 32."""
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    wide = torch.int64 if dtype in (torch.uint16, torch.uint32, torch.uint64) else wide
    operators: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "SUM": torch.logical_or if dtype == torch.bool else torch.add,
        "PRODUCT": torch.logical_and if dtype == torch.bool else torch.mul,
        "MIN": torch.logical_and if dtype == torch.bool else torch.minimum,
        "MAX": torch.logical_or if dtype == torch.bool else torch.maximum,
        "BAND": torch.bitwise_and,
        "BOR": torch.bitwise_or,
        "BXOR": torch.bitwise_xor,
    }
    parts = [_values(rank, dtype, elements).to(wide) for rank in range(size)]
    return functools.reduce(operators[name], parts).to(dtype)


def _every_operator(rank: int, size: int) -> bool:
    elements = 100_000  # more than a chunk of every type
    for dtype in TYPES:
        fractions = dtype.is_floating_point or dtype.is_complex
        for name in test_collectives.OPERATORS:
            op = getattr(dist.ReduceOp, name)
            x = _values(rank, dtype, elements)
            # Of complex numbers torch itself lets sums through only.
            if (fractions and name.startswith("B")) or (dtype.is_complex and name != "SUM"):
                with pytest.raises((RuntimeError, ValueError)):
                    dist.all_reduce(x, op)
                continue
            expected = _in_order(dtype, name, size, elements)
            dist.all_reduce(x, op)
            assert torch.equal(x, expected), (dtype, name)
            root = _values(rank, dtype, elements)
            dist.reduce(root, 1, op)
            assert rank != 1 or torch.equal(root, expected), (dtype, name)
            part = torch.empty(elements // size, dtype=dtype)
            dist.reduce_scatter_tensor(part, _values(rank, dtype, elements), op)
            assert torch.equal(part, expected.chunk(size)[rank]), (dtype, name)
    sparse = torch.sparse_coo_tensor(torch.tensor([[rank, 2]]), torch.tensor([1.0, 2.0]), (4,))
    dist.all_reduce(sparse)
    assert sparse.to_dense().tolist() == [1.0, 1.0, 8.0 + 1.0, 1.0]
    return True


def test_reductions_of_four_ranks_are_in_their_order_for_every_type() -> None:
    _run(4, _every_operator)


def _shapes(rank: int, size: int) -> bool:
    """Non-contiguous and empty tensors, uneven lists, types without arithmetic."""
    turned = torch.arange(6.0).reshape(2, 3).t() * (rank + 1)
    dist.all_reduce(turned)
    assert torch.equal(turned, torch.arange(6.0).reshape(2, 3).t() * 6)
    every_other = torch.zeros(10)
    dist.broadcast(every_other[::2], 1) if rank != 1 else dist.broadcast(torch.ones(5), 1)
    assert every_other.tolist() == ([1.0, 0.0] * 5 if rank != 1 else [0.0] * 10)
    dist.all_reduce(torch.empty(0, 4))
    gathered = [torch.empty(r) for r in range(size)]
    dist.all_gather(gathered, torch.full((rank,), float(rank)))
    assert [g.tolist() for g in gathered] == [[float(r)] * r for r in range(size)]
    columns = torch.zeros(3, size)
    dist.all_gather(list(columns.unbind(1)), torch.full((3,), float(rank)))
    assert columns.tolist() == [[0.0, 1.0, 2.0]] * 3
    eighths = torch.full((4,), float(rank)).to(torch.float8_e4m3fn)
    dist.broadcast(eighths, 2)
    assert eighths.float().tolist() == [2.0] * 4
    split = torch.empty(rank * size)
    dist.all_to_all_single(
        split, torch.arange(3.0), [rank] * size if rank else [0] * size, [0, 1, 2]
    )
    assert split.tolist() == [[], [0.0] * 3, [1.0, 2.0] * 3][rank]
    return True


def test_tensors_of_any_shape() -> None:
    _run(3, _shapes)


def _messages(rank: int, size: int) -> bool:
    big = 3_000_000
    if rank == 0:
        # All are sent before any is received; the second tag is received first.
        works = [dist.isend(torch.full((big,), float(i)), 1, tag=i) for i in range(2)]
        dist.send(torch.tensor([7.0]), 1, tag=5)
        for work in works:
            assert work is not None
            work.wait()
    elif rank == 1:
        for tag in (5, 1, 0):
            got = torch.empty(1 if tag == 5 else big)
            assert dist.recv(got, 0, tag=tag) == 0
            assert (got == (7.0 if tag == 5 else float(tag))).all()
    # Of any rank.
    if rank == 0:
        senders = {dist.recv(torch.empty(3)) for _ in range(size - 1)}
        assert senders == set(range(1, size))
    else:
        dist.send(torch.ones(3), 0)
    dist.barrier()
    return True


def test_messages_cross_and_come_from_any_rank() -> None:
    _run(3, _messages)


def _hooked(rank: int, size: int) -> bool:
    """Ends that wait for other collectives, as hooks do."""

    def then(future: torch.futures.Future[Any]) -> torch.Tensor:
        (again,) = dist.all_reduce(future.value()[0], async_op=True).get_future().wait()
        return again

    works = [dist.all_reduce(torch.ones(2), async_op=True) for _ in range(3)]
    futures = [work.get_future().then(then) for work in works]
    assert [f.wait().tolist() for f in futures] == [[float(size * size)] * 2] * 3
    return True


def test_a_callback_may_wait_for_another_collective() -> None:
    _run(2, _hooked)


def _trains(rank: int, size: int) -> list[torch.Tensor]:
    module = wrapped()
    train(module, adamw(module), batches(rank, 8))
    torch_distro.average(module)
    return [flat(module)]


@pytest.mark.parametrize("mode", ["auto", "ef", "dense"])
def test_ddp_starts_and_trains(mode: str) -> None:
    first, second = _run(2, _trains, options={"mode": mode})
    assert torch.equal(first[0], second[0])


def test_dense_mode_trains_ddp_as_gloo_does_bit_for_bit() -> None:
    ours = run(2, test_exact._dense_ddp, "distro", {}, options=DENSE)
    gloos = run(2, test_exact._dense_ddp, "distro", {}, options={"mode": "dense"})
    assert torch.equal(ours[0], ours[1])
    assert torch.equal(ours[0], gloos[0])


def _sharded(rank: int, size: int) -> torch.Tensor:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(20, 33), torch.nn.Tanh(), torch.nn.Linear(33, 20))
    fully_shard(module)
    train(module, torch.optim.AdamW(module.parameters(), lr=1e-2), batches(rank, 4))
    return torch.cat([p.full_tensor().flatten() for p in module.parameters()]).detach()  # type: ignore[attr-defined]


def test_fsdp_trains_exactly() -> None:
    ours = _run(2, _sharded, options={"mode": "dense"})
    gloos = run(2, _sharded, options={"mode": "dense"})
    assert torch.equal(ours[0], ours[1])
    assert torch.equal(ours[0], gloos[0])


def test_sites_reduce_in_their_own_stream() -> None:
    ran = _run(4, test_sites._train, env=test_sites.TWO_BY_TWO)
    for step in range(12):
        assert torch.equal(ran[0]["weights"][step], ran[1]["weights"][step])
        assert torch.equal(ran[2]["weights"][step], ran[3]["weights"][step])
    assert all(torch.equal(ran[0]["averaged"], other["averaged"]) for other in ran)


def _differs(rank: int, size: int) -> bool:
    dist.all_reduce(torch.ones(3 if rank == 1 else 4))
    return True


def test_ranks_that_differ_all_hear_what_differs() -> None:
    for error in fail(3, _differs, options=TRANSPORT):
        assert error.kind == "DistBackendError"
        assert "ranks 0, 2 do all_reduce of 4 float32 (SUM)" in error.message
        assert "rank 1 does all_reduce of 3 float32 (SUM)" in error.message


@pytest.mark.parametrize("name", ["all_reduce", "recv"])
def test_time_outs_are_heeded(name: str) -> None:
    run(2, test_timeouts._lowered, name, timeout=test_timeouts.LONG, options=TRANSPORT)
    run(2, test_timeouts._raised, name, timeout=test_timeouts.SHORT, options=TRANSPORT)


def test_a_rank_killed_in_a_collective_is_named_by_every_survivor() -> None:
    outcome = launch(
        test_faults.RANKS,
        test_faults._collectives_until_killed,
        *(1, 0.3),
        timeout=test_faults.TIMEOUT,
        options=TRANSPORT,
    )
    test_faults._expect_blame(outcome, 1, "over the transport")


def _monitored(rank: int, size: int) -> list[str]:
    errors = []
    dist.monitored_barrier()
    for wait_all in (False, True):
        if rank in (1, 2):
            time.sleep(1.0)
        try:
            dist.monitored_barrier(timeout=datetime.timedelta(seconds=0.4), wait_all_ranks=wait_all)
        except RuntimeError as error:
            errors.append(str(error))
        dist.barrier()
    dist.monitored_barrier()
    x = torch.ones(1)
    dist.all_reduce(x)
    assert x.item() == size
    return errors


def test_a_monitored_barrier_names_who_is_missing_and_the_group_goes_on() -> None:
    first, _, _, third = run(4, _monitored, options=TRANSPORT)
    assert "Rank 1 failed to pass monitoredBarrier in 400 ms" in first[0]
    assert "Ranks 1, 2 failed to pass monitoredBarrier in 400 ms" in first[1]
    assert len(third) == 2
    assert re.search("Rank 3 successfully reached monitoredBarrier, but received", third[0])


def _bound(rank: int, size: int) -> dict[str, Any]:
    x = torch.ones(1_000_000)
    dist.all_reduce(x)
    return torch_distro.stats()


def test_two_ports_a_rank_are_bound_and_bytes_are_counted() -> None:
    first, second = _run(2, _bound, options={"ports": "41300-41399"})
    assert first["exact_bytes"] >= 4_000_000
    # What it has sent itself may still be on its way.
    assert second["socket_bytes_received"] > 4_000_000
