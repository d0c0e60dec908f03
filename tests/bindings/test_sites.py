"""Sites (DISTRO_SITE): ranks that average gradients exactly and exchange as one participant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_distro
from models import adamw, batches, flat, train, wrapped
from ranks import run
from torch import nn

EVERYTHING = {"k": 4096, "value_bits": 32, "delay": 0}


def sites(*labels: str) -> list[dict[str, str]]:
    """Environments by rank; no label: none."""
    return [{"DISTRO_SITE": label} if label else {} for label in labels]


TWO_BY_TWO = sites("berlin", "berlin", "lyon", "lyon")


def _sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def _data(ranks: list[int], steps: int) -> list[torch.Tensor]:
    """The batches of these ranks, one after the other in one."""
    streams = [batches(rank, steps) for rank in ranks]
    return [torch.cat(parts) for parts in zip(*streams, strict=True)]


def _train(
    rank: int,
    size: int,
    normalises: bool = True,
    shares: list[list[int]] | None = None,
    steps: int = 12,
) -> dict[str, Any]:
    """`shares`: by rank, whose batches it trains on."""
    module = wrapped()
    weights: list[torch.Tensor] = []
    losses = train(
        module,
        adamw(module) if normalises else _sgd(module),
        _data(shares[rank] if shares else [rank], steps),
        lambda _: weights.append(flat(module)),
    )
    result: dict[str, Any] = {"losses": losses, "weights": weights}
    if dist.get_backend() == "distro":
        result["stats"] = torch_distro.stats()
    torch_distro.average(module)
    return result | {"averaged": flat(module)}


def test_ranks_of_a_site_hold_the_same_weights_after_every_step() -> None:
    ran = run(4, _train, env=TWO_BY_TWO)
    for left, right in ((0, 1), (2, 3)):
        for ours, theirs in zip(ran[left]["weights"], ran[right]["weights"], strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(ran[0]["weights"][-1], ran[2]["weights"][-1])
    assert len({own["stats"]["reference_checksum"] for own in ran}) == 1
    assert all(torch.equal(own["averaged"], ran[0]["averaged"]) for own in ran)
    assert ran[0]["losses"][-1] < ran[0]["losses"][0]


@pytest.mark.parametrize("delay", ["0", "1"])
def test_two_sites_of_two_train_as_two_ranks_with_twice_the_batch(delay: str) -> None:
    env = [each | {"DISTRO_DELAY": delay} for each in TWO_BY_TWO]
    houses = run(4, _train, env=env)
    ranks = run(2, _train, True, [[0, 1], [2, 3]], env={"DISTRO_DELAY": delay})
    for participant, leader in enumerate((0, 2)):
        ours, theirs = houses[leader], ranks[participant]
        assert ours["stats"]["exchanges"] == theirs["stats"]["exchanges"] == 11
        for left, right in zip(ours["weights"], theirs["weights"], strict=True):
            # To rounding, which the exchange amplifies where it changes a selection.
            assert (left - right).abs().mean() < 1e-4
        assert (ours["averaged"] - theirs["averaged"]).abs().mean() < 1e-4


def test_between_sites_go_the_bytes_of_as_many_ranks() -> None:
    houses = [own["stats"] for own in run(4, _train, env=TWO_BY_TWO)]
    ranks = [own["stats"] for own in run(2, _train, True, [[0, 1], [2, 3]])]
    for leader, alone in ((houses[0], ranks[0]), (houses[2], ranks[1])):
        # What average() and the beginning say of each rank is passed on.
        assert leader["payload_bytes_sent"] == pytest.approx(alone["payload_bytes_sent"], abs=200)
        assert leader["participants"] == 2
    for member in (houses[1], houses[3]):
        assert member["payload_bytes_sent"] == member["payload_bytes_received"] == 0
        assert member["site_bytes"] >= member["gradient_bytes"]


@pytest.mark.parametrize("labels", ["aabb", "abbb", "abac", "aabbccdd", "aaaabbbb"])
def test_everything_sent_at_once_by_sgd_is_dense_training(labels: str) -> None:
    """Sites of different sizes count by their ranks."""
    gloo = run(len(labels), _train, False, backend="gloo")
    distro = run(len(labels), _train, False, env=sites(*labels), options=EVERYTHING)
    for ours, theirs in zip(distro, gloo, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
        assert torch.allclose(ours["averaged"], theirs["averaged"], atol=1e-5)


def test_labels_that_differ_on_all_ranks_change_nothing() -> None:
    apart = run(3, _train, env=sites("a", "b", "c"))
    plain = run(3, _train)
    for ours, theirs in zip(apart, plain, strict=True):
        assert ours["losses"] == theirs["losses"]
        assert torch.equal(ours["averaged"], theirs["averaged"])


@pytest.mark.parametrize("label", ["house", "host"])
def test_one_site_is_dense_and_sends_nothing(label: str) -> None:
    gloo = run(2, _train, backend="gloo")
    house = run(2, _train, env={"DISTRO_SITE": label})
    for ours, theirs in zip(house, gloo, strict=True):
        assert ours["losses"] == theirs["losses"]
        assert ours["stats"]["payload_bytes_sent"] == 0
        assert ours["stats"]["participants"] == 1
        (module,) = ours["stats"]["modules"]
        assert module["mode"] == "exact"
        assert "one site" in module["reason"]
