"""`weights` mode across a restart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_distro
from models import adamw, batches, flat, train, wrapped
from ranks import run
from torch.nn.parallel import DistributedDataParallel


def _resume(rank: int, size: int) -> dict[str, Any]:
    data = batches(rank, 10)
    module = wrapped()
    optimizer = adamw(module)
    train(module, optimizer, data[:5])
    state, script = torch_distro.state_dict(module), copy.deepcopy(optimizer.state_dict())
    if rank == 0:
        checkpoint: list[Any] = [copy.deepcopy(module.module.state_dict())]
    else:
        checkpoint = [None]
    dist.broadcast_object_list(checkpoint)
    resumed = wrapped(5)
    resumed.module.load_state_dict(checkpoint[0])  # rank 0's, as scripts do
    torch_distro.load_state_dict(resumed, state)
    assert state["reference"]["scale"].shape == torch.Size([])
    again = adamw(resumed)
    again.load_state_dict(script)
    train(resumed, again, data[5:])
    stats = torch_distro.stats()["modules"]
    torch_distro.average(resumed)
    return {"weights": flat(resumed), "exchanges": stats[1]["exchanges"]}


def test_a_resume_from_every_ranks_own_state() -> None:
    results = run(2, _resume)
    assert results[0]["exchanges"] == 8
    assert torch.equal(results[0]["weights"], results[1]["weights"])


BEFORE, AFTER = 60, 60


def _loss(module: DistributedDataParallel) -> float:
    """Of the mean of the ranks' weights, which is what a training ends with, on unseen data."""
    mean = copy.deepcopy(module.module)
    torch_distro.average(mean)
    with torch.no_grad():
        return sum((mean(x) - x.roll(1, 1)).square().mean().item() for x in batches(99, 8)) / 8


def _ways(rank: int, size: int) -> dict[str, Any]:
    """Train, stop, and go on in each of the ways in which a script can."""
    data = batches(rank, BEFORE + AFTER)
    module = wrapped()
    optimizer = adamw(module)
    train(module, optimizer, data[:BEFORE])
    own = torch_distro.state_dict(module)
    momenta = copy.deepcopy(optimizer.state_dict())  # the rank's own, but for a rank 0 checkpoint

    def from_rank_0(what: Any) -> Any:  # noqa: ANN401
        received = [what]
        dist.broadcast_object_list(received)
        return received[0]

    checkpoint = from_rank_0(copy.deepcopy(module.module.state_dict()))
    momenta_of_0 = from_rank_0(momenta)
    averaged = copy.deepcopy(module.module)
    torch_distro.average(averaged)

    losses = {"at the stop": _loss(module)}
    train(module, optimizer, data[BEFORE:])
    losses["never stopped"] = _loss(module)
    for way, weights, optimizer_state in (
        ("each rank's own state", checkpoint, momenta),
        ("average() before saving", averaged.state_dict(), momenta_of_0),
        ("rank 0's weights", checkpoint, momenta_of_0),
    ):
        resumed = wrapped(5)
        resumed.module.load_state_dict(weights)
        if way == "each rank's own state":
            torch_distro.load_state_dict(resumed, own)
        again = adamw(resumed)
        again.load_state_dict(copy.deepcopy(optimizer_state))
        losses[f"{way}, at the start"] = _loss(resumed)
        train(resumed, again, data[BEFORE:])
        losses[way] = _loss(resumed)
    return losses


def test_what_a_resume_loses() -> None:
    losses, others = run(4, _ways)[:2]
    for way, loss in losses.items():
        print(f"{way:40} {loss:.4f}")
    assert losses == others
    stop = losses["at the stop"]
    assert losses["each rank's own state, at the start"] == pytest.approx(stop, rel=0.02)
    assert losses["average() before saving, at the start"] == pytest.approx(stop, rel=1e-3)
    assert losses["rank 0's weights, at the start"] > stop
    assert losses["each rank's own state"] == pytest.approx(losses["never stopped"], rel=0.05)


def _before_training(rank: int, size: int) -> bool:
    module = wrapped()
    weights = flat(module)
    state = torch_distro.state_dict(module)
    again = wrapped()
    torch_distro.load_state_dict(again, state)
    assert torch.equal(flat(again), weights)
    train(again, adamw(again), batches(rank, 2))
    return True


def test_the_state_of_a_module_that_has_not_trained_holds_its_weights() -> None:
    run(2, _before_training)
