"""`weights` mode under real DDP: what is exchanged, when, and that all ranks agree.

All hold the same reference.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_distro
from models import Mixed, adamw, batches, flat, train, wrapped
from ranks import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STEPS = 12


def _every_step(
    rank: int, size: int, options: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Mixed(unused=bool(options.get("find_unused_parameters"))).to(dtype)
    module = DistributedDataParallel(model, **options)
    checksums: list[int] = []
    losses = train(
        module,
        adamw(module),
        batches(rank, STEPS, dtype),
        lambda _: checksums.append(torch_distro.stats()["reference_checksum"]),
    )
    stats = torch_distro.stats()
    own = flat(module)
    torch_distro.average(module)
    return {
        "checksums": checksums,
        "losses": losses,
        "stats": stats,
        "own": own,
        "mean": flat(module),
    }


def _check(results: list[dict[str, Any]]) -> None:
    first = results[0]
    assert len(set(first["checksums"])) >= STEPS - 1
    for other in results[1:]:
        assert other["checksums"] == first["checksums"]
        assert torch.equal(other["mean"], first["mean"])
        assert not torch.equal(other["own"], first["own"])
    assert first["losses"][-1] < first["losses"][0]
    assert first["stats"]["exchanges"] == STEPS - 1
    assert first["stats"]["modules"][0]["mode"] == "weights"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"static_graph": True},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_ranks_hold_the_same_reference_at_every_step(options: dict[str, bool]) -> None:
    _check(run(2, _every_step, options, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_floating_type_is_exchanged(dtype: torch.dtype) -> None:
    _check(run(2, _every_step, {}, dtype))


@pytest.mark.parametrize("delay", ["0", "1"])
def test_four_ranks(delay: str) -> None:
    _check(run(4, _every_step, {}, torch.float32, env={"DISTRO_DELAY": delay}))


def _payload(rank: int, size: int) -> int:
    module = wrapped()
    train(module, adamw(module), batches(rank, 4))
    return torch_distro.stats()["payload_bytes_sent"]


def test_options_by_pg_options_win_over_the_environment() -> None:
    env = {"DISTRO_K": "6"}
    small = run(2, _payload, env=env)
    large = run(2, _payload, env=env, options={"k": 512, "transport": "ipc"})
    assert large[0] > 5 * small[0]


def _sgd(rank: int, size: int, backend: str) -> torch.Tensor:
    group = dist.group.WORLD if backend == "distro" else dist.new_group(backend=backend)
    options = torch_distro.Options(k=4096, value_bits=32, delay=0)
    if backend == "distro":
        group = dist.new_group(backend="distro", pg_options=options)
    module = wrapped(process_group=group)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    train(module, optimizer, batches(rank, 30))
    if backend == "distro":
        # The last step's moves are exchanged at the next training forward.
        module(batches(rank, 1)[0])
    return flat(module)


def test_everything_sent_with_sgd_is_gloos_training_to_rounding() -> None:
    distro = run(2, _sgd, "distro")
    gloo = run(2, _sgd, "gloo")
    assert torch.equal(distro[0], distro[1])
    assert (distro[0] - gloo[0]).abs().max() < 2e-6
    assert (gloo[0] - flat(Mixed()).mean()).abs().max() > 1e-2  # it did train


def _accumulate(rank: int, size: int) -> dict[str, Any]:
    module = wrapped()
    optimizer = adamw(module)
    for x, y in zip(batches(rank, 6), batches(rank + 50, 6), strict=True):
        optimizer.zero_grad()
        with module.no_sync():
            module(x).square().mean().backward()
        module(y).square().mean().backward()
        optimizer.step()
    stats = torch_distro.stats()
    return {"exchanges": stats["exchanges"], "checksum": stats["reference_checksum"]}


def test_accumulation_under_no_sync_exchanges_once_a_step() -> None:
    results = run(2, _accumulate)
    assert results[0] == results[1]
    assert results[0]["exchanges"] == 5


def _evaluate(rank: int, size: int) -> dict[str, Any]:
    module = wrapped()

    def evaluate(step: int) -> None:
        if rank == 1 and step % 2:
            module.eval()
            with torch.no_grad():
                for x in batches(7, 3):
                    module(x)
            module.train()

    train(module, adamw(module), batches(rank, STEPS), evaluate)
    stats = torch_distro.stats()
    return {"exchanges": stats["exchanges"], "checksum": stats["reference_checksum"]}


def test_evaluation_by_one_rank_between_steps_does_not_disturb_the_count() -> None:
    results = run(2, _evaluate)
    assert results[0] == results[1]


def _double_forward(rank: int, size: int) -> int:
    module = wrapped()
    optimizer = adamw(module)
    for x, y in zip(batches(rank, 5), batches(rank + 50, 5), strict=True):
        optimizer.zero_grad()
        (module(x).square().mean() + module(y).square().mean()).backward()
        optimizer.step()
    return torch_distro.stats()["exchanges"]


def test_two_forwards_before_one_backward_are_one_exchange() -> None:
    assert run(2, _double_forward, env={"TORCH_DISTRIBUTED_DEBUG": "OFF"}) == [4, 4]


def _channels_last(rank: int, size: int) -> torch.Tensor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 40, 7), nn.ReLU(), nn.Conv2d(40, 8, 3)).to(
        memory_format=torch.channels_last
    )
    module = DistributedDataParallel(net)
    optimizer = adamw(module)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(5):
        optimizer.zero_grad()
        module(torch.randn(2, 3, 12, 12, generator=generator)).square().mean().backward()
        optimizer.step()
    torch_distro.average(module)
    weight = net.get_parameter("0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    return flat(module)


def test_weights_in_another_memory_order() -> None:
    results = run(2, _channels_last)
    assert torch.equal(results[0], results[1])


def _far_apart(rank: int, size: int) -> int:
    module = wrapped()
    train(
        module,
        adamw(module),
        batches(rank, 5),
        lambda step: time.sleep(3) if (step, rank) == (3, 1) else None,
    )
    return torch_distro.stats()["exchanges"]


def test_a_rank_that_ends_early_does_not_disturb_one_that_is_late() -> None:
    assert run(3, _far_apart) == [4, 4, 4]


def _uneven(rank: int, size: int) -> dict[str, Any]:
    from torch.distributed.algorithms.join import Join

    module = wrapped()
    optimizer = adamw(module)
    for epoch in range(2):
        with Join([module]):
            train(module, optimizer, batches(rank + 10 * epoch, 6 if rank == 0 else 1 + 2 * epoch))
    stats = torch_distro.stats()
    torch_distro.average(module)
    return {
        "weights": flat(module),
        "exchanges": stats["exchanges"],
        "resyncs": stats["resyncs"],
        "checksum": stats["reference_checksum"],
    }


@pytest.mark.parametrize("delay", ["0", "1"])
def test_join_with_uneven_inputs_over_two_epochs(delay: str) -> None:
    results = run(2, _uneven, env={"DISTRO_DELAY": delay})
    assert torch.equal(results[0].pop("weights"), results[1].pop("weights"))
    assert results[0] == results[1]
    assert results[0]["exchanges"] == 11
    assert results[0]["resyncs"] == 1  # join() copied one rank's weights to all after the first
