"""`with torch_distro.reference(module)`: what all ranks have in common, and what is said of it."""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch_distro
from models import adamw, batches, flat, train, wrapped
from ranks import run

STEPS = 8


def _shown(rank: int, size: int) -> dict[str, Any]:
    module = wrapped()
    optimizer = adamw(module)
    data = batches(rank, 2 * STEPS)
    with torch_distro.reference(module):  # nothing has begun
        begin = flat(module)
    train(module, optimizer, data[:STEPS])
    own = flat(module)
    state = torch_distro.state_dict(module)
    with torch_distro.reference(module), torch.no_grad():
        shown = flat(module)
        output = module(data[0])
        inside = module.module(data[0])
    back = flat(module)
    train(module, optimizer, data[STEPS:])
    return {
        "begin": begin,
        "own": own,
        "shown": shown,
        "reference": torch.cat([w.flatten() for w in state["reference"].values()]),
        "same": torch.equal(output, inside),
        "back": back,
        "end": flat(module),
    }


def _undisturbed(rank: int, size: int) -> torch.Tensor:
    module = wrapped()
    train(module, adamw(module), batches(rank, 2 * STEPS))
    return flat(module)


@pytest.mark.parametrize("options", [{}, {"delay": 0}, {"k": 100, "spread": 0}])
def test_the_reference_is_shown_and_the_weights_come_back(options: dict[str, Any]) -> None:
    first, second = run(2, _shown, options=options)
    assert torch.equal(first["begin"], second["begin"])
    assert not torch.equal(first["own"], second["own"])
    assert torch.equal(first["shown"], second["shown"])
    assert not torch.equal(first["shown"], first["begin"])
    for result in (first, second):
        assert torch.equal(result["shown"], result["reference"])
        assert torch.equal(result["back"], result["own"])
        assert result["same"]
    undisturbed = run(2, _undisturbed, options=options)
    assert torch.equal(first["end"], undisturbed[0])
    assert torch.equal(second["end"], undisturbed[1])


def test_what_is_still_to_come_of_a_spread_gain_is_not_shown() -> None:
    first, second = run(2, _shown, options={"k": 100})
    assert torch.equal(first["shown"], second["shown"])
    assert not torch.equal(first["shown"], first["reference"])


def _misused(rank: int, size: int) -> dict[str, str]:
    module = wrapped()
    optimizer = adamw(module)
    train(module, optimizer, batches(rank, 3))
    said = {}
    for name, use in {
        "forward": lambda: module(batches(rank, 1)[0]),
        "state": lambda: torch_distro.state_dict(module),
        "again": lambda: torch_distro.reference(module).__enter__(),
    }.items():
        with torch_distro.reference(module):
            try:
                use()
            except Exception as error:  # the kind is part of what is looked at
                said[name] = f"{type(error).__name__}: {error}"
    return said


def test_the_own_weights_are_asked_for_where_they_are_needed() -> None:
    for rank, said in enumerate(run(2, _misused)):
        assert said.keys() == {"forward", "state", "again"}
        for error in said.values():
            assert f"rank {rank}: " in error
            assert "inside `with torch_distro.reference(module)`" in error


def _elsewhere(rank: int, size: int) -> bool:
    plain = torch.nn.Linear(3, 3)
    module = wrapped()
    before = flat(module)
    with torch_distro.reference(plain), torch_distro.reference(module):
        return torch.equal(flat(module), before)


def test_a_module_that_is_not_exchanged_stays_as_it_is() -> None:
    assert run(2, _elsewhere, options={"mode": "dense"}) == [True, True]


def _evaluating(rank: int, size: int, ways: list[str]) -> str:
    """What a rank says on stderr."""
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 2)
        module = wrapped()
        optimizer = adamw(module)
        for way in ways:
            train(module, optimizer, batches(rank, 2))
            if way == "average":
                torch_distro.average(module)
            shown = torch_distro.reference(module) if way == "reference" else nullcontext()
            with torch.no_grad(), shown:
                module(batches(rank, 1)[0])
        file.seek(0)
        return file.read()


def test_the_first_evaluation_of_own_weights_is_commented_once() -> None:
    first, second = run(2, _evaluating, ["average", "reference", "own", "average", "own"])
    assert second == ""
    assert first.count("an evaluation sees this rank's own weights") == 1
    assert "torch_distro.average(module)" in first
    assert "torch_distro.reference(module)" in first
    assert run(2, _evaluating, ["reference", "average"]) == ["", ""]
