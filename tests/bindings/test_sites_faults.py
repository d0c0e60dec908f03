"""Sites (DISTRO_SITE): what goes wrong in them, and what a script does to its weights."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch_distro
from models import adamw, batches, flat, train, wrapped
from ranks import RankError, fail, launch, run
from test_sites import EVERYTHING, TWO_BY_TWO, sites
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer


def _train(rank: int, size: int) -> None:
    module = wrapped()
    train(module, adamw(module), batches(rank, 30))


def test_a_label_that_some_ranks_of_a_host_lack_is_an_error_that_names_them() -> None:
    for error in fail(3, _train, env=sites("a", "", "a")):
        assert "DISTRO_SITE is set for ranks 0, 2 and not for rank 1" in error.message


def test_sites_belong_to_weights_mode() -> None:
    for error in fail(2, _train, env={"DISTRO_SITE": "a", "DISTRO_MODE": "ef"}):
        assert "DISTRO_SITE=a" in error.message
        assert "weights" in error.message


def test_a_bad_label_is_an_error_that_says_what_is_allowed() -> None:
    for error in fail(2, _train, env={"DISTRO_SITE": "my house"}):
        assert "DISTRO_SITE=my house is not allowed" in error.message


def _drift(rank: int, size: int, culprit: int) -> None:
    module = wrapped()

    def damage(step: int) -> None:
        if step == 5 and rank == culprit:
            with torch.no_grad():
                module.module.second.bias[7] += 1e-3

    train(module, adamw(module), batches(rank, 40), damage)


def test_of_two_ranks_of_a_site_that_drift_apart_both_are_named() -> None:
    for error in fail(4, _drift, 2, env=TWO_BY_TWO):
        assert "ranks 2, 3 differ from each other" in error.message


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_whose_weights_drift_from_its_site_is_named(culprit: int) -> None:
    for error in fail(4, _drift, culprit, env=sites("a", "a", "a", "b")):
        assert "weights of site 'a' (ranks 0, 1, 2) are not the same on its ranks" in error.message
        assert f"rank {culprit} of 3 differs" in error.message


def _die(rank: int, size: int, culprit: int) -> None:
    module = wrapped()

    def kill(step: int) -> None:
        if step == 5 and rank == culprit:
            os.kill(os.getpid(), signal.SIGKILL)

    train(module, adamw(module), batches(rank, 40), kill)


@pytest.mark.parametrize("culprit", [0, 1, 2, 3])
def test_a_dead_rank_is_named_by_all_sites(culprit: int) -> None:
    for rank, error in enumerate(launch(4, _die, culprit, env=TWO_BY_TWO, timeout=20)):
        if rank != culprit:
            assert isinstance(error, RankError)
            assert error.kind == "DistBackendError"
            assert f"rank {culprit}" in error.message


def _stop(rank: int, size: int, culprit: int) -> None:
    module = wrapped()

    def stop(step: int) -> None:
        if step == 5 and rank == culprit:
            os.kill(os.getpid(), signal.SIGSTOP)

    train(module, adamw(module), batches(rank, 40), stop)


def test_a_rank_that_hangs_is_named_in_the_other_site() -> None:
    awaited = [0, 2, 3]
    outcome = launch(4, _stop, 1, env=TWO_BY_TWO, timeout=5, deadline=60, awaited=awaited)
    for rank in awaited:
        error = outcome[rank]
        assert isinstance(error, RankError)
        assert "rank 1" in error.message
        assert "rank 0 is late" not in error.message


def _ahead(rank: int, size: int) -> None:
    """Rank 1, which leads no site, makes one training forward alone."""
    module = wrapped()
    train(module, adamw(module), batches(rank, 5))
    if rank == 1:
        module(torch.zeros(1, 20))
    try:
        torch_distro.average(module)
    finally:
        time.sleep(1)  # a process that ends at once may take its last words along


def test_a_rank_that_is_ahead_of_its_site_is_named_at_once() -> None:
    for error in fail(4, _ahead, env=TWO_BY_TWO, timeout=300, deadline=60):
        assert "rank 1 is at its exchange" in error.message
        assert "average()" in error.message


class _Words(nn.Module):
    """An embedding whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 20, sparse=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x.abs().mul(9).long().clamp(max=49)[:, 0])


def _sparse(rank: int, size: int) -> torch.Tensor:
    torch.manual_seed(0)
    module = nn.parallel.DistributedDataParallel(_Words())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for x in batches(rank, 5):
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch_distro.average(module)
    return flat(module)


def test_sparse_gradients_are_averaged_in_a_site() -> None:
    ran = run(4, _sparse, env=TWO_BY_TWO, options=EVERYTHING)
    for ours, theirs in zip(ran, run(4, _sparse, backend="gloo"), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def _edit(rank: int, size: int, editor: int, by_hand: bool) -> dict[str, Any]:
    module = wrapped()

    def edit(step: int) -> None:
        if step != 4 or rank != editor:
            return
        if by_hand:
            with torch.no_grad():
                module.module.first.weight.zero_()
            torch_distro.resync(module)
        else:
            state = {name: value * 0.5 for name, value in module.state_dict().items()}
            module.load_state_dict(state)

    train(module, adamw(module), batches(rank, 12), edit)
    stats = torch_distro.stats()
    own = flat(module)
    torch_distro.average(module)
    return {"stats": stats, "own": own, "mean": flat(module)}


@pytest.mark.parametrize("delay", ["0", "1"])
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("editor", [0, 3])
def test_weights_that_one_rank_edits_are_shared_by_all(
    editor: int, by_hand: bool, delay: str
) -> None:
    env = [each | {"DISTRO_DELAY": delay} for each in TWO_BY_TWO]
    ran = run(4, _edit, editor, by_hand, env=env)
    for rank, own in enumerate(ran):
        assert own["stats"]["resyncs"] == 1
        assert own["stats"]["reference_checksum"] == ran[0]["stats"]["reference_checksum"]
        assert torch.equal(own["own"], ran[rank // 2 * 2]["own"])
        assert torch.equal(own["mean"], ran[0]["mean"])


def _other_door(rank: int, size: int, exact: list[int], begun: bool) -> dict[str, Any]:
    """The ranks `exact` go exact, from the start or after some exchanges."""
    module = wrapped()
    if begun:
        train(module, adamw(module), batches(rank, 4))
    optimizer = adamw(module)
    if rank in exact:
        optimizer = ZeroRedundancyOptimizer(module.parameters(), torch.optim.AdamW, lr=1e-2)
    train(module, optimizer, batches(rank + 100, 4))
    return {"weights": flat(module), "modules": torch_distro.stats()["modules"]}


@pytest.mark.parametrize("begun", [True, False])
def test_sites_that_all_go_exact_do_so_together(begun: bool) -> None:
    ran = run(4, _other_door, [0, 1, 2, 3], begun, env=TWO_BY_TWO)
    for own in ran:
        assert [module["mode"] for module in own["modules"]] == ["exact"]
        assert torch.equal(own["weights"], ran[0]["weights"])


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("exact", [[0], [3], [2, 3]])
def test_ranks_of_sites_that_go_exact_alone_are_named(exact: list[int], begun: bool) -> None:
    for error in fail(4, _other_door, exact, begun, env=TWO_BY_TWO):
        assert "do not treat module 0 alike" in error.message
        assert "ZeroRedundancyOptimizer" in error.message


def _uneven(rank: int, size: int, epochs: list[list[int]], normalises: bool) -> dict[str, Any]:
    """Batches of each rank in each epoch, under join()."""
    module = wrapped()
    optimizer = adamw(module) if normalises else torch.optim.SGD(module.parameters(), lr=0.1)
    for number, counts in enumerate(epochs):
        with module.join():
            train(module, optimizer, batches(rank + 10 * number, counts[rank]))
    train(module, optimizer, batches(rank + 100, 20))
    state = torch_distro.state_dict(module)
    own = flat(module)
    stats = torch_distro.stats()
    torch_distro.average(module)
    return {"stats": stats, "own": own, "mean": flat(module), "residual": state["residual"]}


@pytest.mark.parametrize("normalises", [True, False])
@pytest.mark.parametrize(
    "epochs",
    [[[3, 10, 10, 10]], [[10, 10, 10, 3]], [[1, 2, 6, 6]], [[0, 6, 6, 6], [9, 9, 9, 9]]],
    ids=str,
)
def test_a_site_goes_on_without_ranks_that_have_no_more_data(
    epochs: list[list[int]], normalises: bool
) -> None:
    """And as one afterwards, though the optimizers have not seen the same steps."""
    ran = run(4, _uneven, epochs, normalises, env=TWO_BY_TWO)
    for own in ran:
        assert own["stats"]["exchanges"] == ran[0]["stats"]["exchanges"]
        assert own["stats"]["reference_checksum"] == ran[0]["stats"]["reference_checksum"]
        assert torch.equal(own["mean"], ran[0]["mean"])
    if normalises:
        return  # Adam's moments differ, and so what each rank has moved since the last exchange
    for leader, member in ((0, 1), (2, 3)):
        for name, residual in ran[leader]["residual"].items():
            assert torch.equal(residual, ran[member]["residual"][name])


def _not_finite(rank: int, size: int, culprit: int) -> None:
    module = wrapped()

    def damage(step: int) -> None:
        if step == 5 and rank // 2 == culprit:
            with torch.no_grad():
                module.module.second.bias[7] = float("nan")

    train(module, adamw(module), batches(rank, 12), damage)


@pytest.mark.parametrize("delay", ["0", "1"])
def test_weights_of_a_site_that_are_not_finite_end_all_ranks(delay: str) -> None:
    env = [each | {"DISTRO_DELAY": delay} for each in TWO_BY_TWO]
    for error in fail(4, _not_finite, 1, env=env, options={"turns": 1}):
        assert "non-finite" in error.message
        assert "second.bias" in error.message
