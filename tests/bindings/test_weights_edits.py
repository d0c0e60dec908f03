"""`weights` mode where the script overwrites weights itself: all ranks take the mean."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_distro
from models import Mixed, adamw, batches, flat, train, wrapped
from ranks import run
from torch import nn


def _load(rank: int, size: int, delay: int) -> dict[str, Any]:
    module = wrapped()
    start = copy.deepcopy(module.module.state_dict())
    optimizer = adamw(module)
    train(module, optimizer, batches(rank, 5))
    module.module.load_state_dict(start)
    before = torch_distro.stats()["resyncs"]
    train(module, torch.optim.SGD(module.parameters(), lr=0.0), batches(rank, 4))
    return {
        "resyncs": (before, torch_distro.stats()["resyncs"]),
        "distance": (flat(module) - flat(wrapped())).abs().max().item() if delay == 0 else 0.0,
        "weights": flat(module),
    }


@pytest.mark.parametrize("delay", [0, 1])
def test_loading_a_state_dict_in_the_middle_resyncs_all_ranks(delay: int) -> None:
    results = run(2, _load, delay, env={"DISTRO_DELAY": str(delay), "DISTRO_GAIN": "1"})
    assert results[0]["resyncs"] == (0, 1)
    assert torch.equal(results[0]["weights"], results[1]["weights"])
    torch.manual_seed(0)
    assert torch.equal(results[0]["weights"], flat(Mixed()))  # what was loaded, on all ranks


def _edit(rank: int, size: int) -> torch.Tensor:
    module = wrapped()
    frozen = torch.optim.SGD(module.parameters(), lr=0.0)
    train(module, frozen, batches(rank, 3))
    if rank == 1:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(2.0 if parameter.requires_grad else 0.0)
        torch_distro.resync(module)
    train(module, frozen, batches(rank, 3))
    return flat(module)


def test_resync_takes_the_mean_of_an_edit() -> None:
    results = run(2, _edit)
    torch.manual_seed(0)
    assert torch.equal(results[0], results[1])
    assert torch.allclose(results[0], (flat(Mixed()) + 2.0) / 2, atol=1e-6)


def _container(rank: int, size: int) -> list[list[float]]:
    pair = nn.ModuleList([wrapped(0), wrapped(1)])
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.0)
    for module in pair:
        train(module, optimizer, batches(rank, 3))
    pair.load_state_dict({name: torch.full_like(w, 5.0) for name, w in pair.state_dict().items()})
    for module in pair:
        train(module, optimizer, batches(rank, 3))
    return [sorted(set(flat(module).tolist())) for module in pair]


def test_loading_a_container_of_wrapped_modules_marks_all_of_them() -> None:
    assert run(2, _container) == [[[5.0], [5.0]]] * 2


def _partial_load(rank: int, size: int) -> list[float]:
    module = wrapped()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    train(module, optimizer, batches(rank, 3))
    state = {name: torch.full_like(w, 0.5) for name, w in module.module.state_dict().items()}
    del state["scale"]
    with pytest.raises(RuntimeError, match="scale"):
        module.module.load_state_dict(state)
    train(module, optimizer, batches(rank, 3))
    return sorted(set(module.module.first.weight.detach().flatten().tolist()))


def test_what_a_load_that_raises_has_copied_is_kept() -> None:
    assert run(2, _partial_load) == [[0.5], [0.5]]
