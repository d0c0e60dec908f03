"""Modes ef and demo across a restart: what was not sent yet is in the state of each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_distro
from gradient_models import Net, backward, data, model, weights
from ranks import run
from torch.nn.parallel import DistributedDataParallel

STEPS = 4  # before the stop, and after it


def _steps(module: DistributedDataParallel, optimizer: Any, rank: int, steps: range) -> None:  # noqa: ANN401
    for step in steps:
        optimizer.zero_grad()
        backward(module, data(rank, step))
        optimizer.step()


def _wrapped(net: Net | None = None) -> tuple[DistributedDataParallel, torch.optim.SGD]:
    module = DistributedDataParallel(net or model())
    return module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def _unbroken(rank: int, size: int, folder: Path) -> torch.Tensor:
    """Save on the way, and go on."""
    module, optimizer = _wrapped()
    _steps(module, optimizer, rank, range(STEPS))
    state = torch_distro.state_dict(module)
    script = {"model": module.module.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({"script": script, "distro": state}, folder / f"rank{rank}.pt")
    _steps(module, optimizer, rank, range(STEPS, 2 * STEPS))
    return weights(module)


def _resumed(rank: int, size: int, folder: Path, loads: bool) -> torch.Tensor:
    saved = torch.load(folder / f"rank{rank}.pt")
    module, optimizer = _wrapped()
    module.module.load_state_dict(saved["script"]["model"])
    optimizer.load_state_dict(saved["script"]["optimizer"])
    if loads:
        torch_distro.load_state_dict(module, saved["distro"])
    _steps(module, optimizer, rank, range(STEPS, 2 * STEPS))
    exchanges = torch_distro.stats()["modules"][0]["exchanges"]
    assert exchanges == (2 * STEPS if loads else STEPS)
    return weights(module)


@pytest.mark.parametrize("transform", ["dct", "none"])
@pytest.mark.parametrize("mode", ["ef", "demo"])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(
    mode: str, transform: str, tmp_path: Path
) -> None:
    options = {"mode": mode, "transform": transform}
    unbroken = run(2, _unbroken, tmp_path, options=options)
    resumed = run(2, _resumed, tmp_path, True, options=options)
    without = run(2, _resumed, tmp_path, False, options=options)
    for rank in range(2):
        assert torch.equal(unbroken[rank], resumed[rank])
        assert not torch.equal(unbroken[rank], without[rank])


def _refused(rank: int, size: int) -> bool:
    module, optimizer = _wrapped()
    _steps(module, optimizer, rank, range(2))
    state = torch_distro.state_dict(module)
    first = state["residual"]["first.weight"]
    assert first.shape == (5000,)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"mode": "demo"}, "the state is of mode demo and the module in mode ef"),
        ({"transform": "none"}, "saved with transform='none'"),
        ({"residual": {"third.weight": first}}, "other parameters than the module: third.weight"),
        ({"residual": {"first.weight": first[1:]}}, "first.weight has 4999 values where"),
        ({"residual": {"first.weight": first / 0}}, "first.weight is not finite"),
    ]
    for change, says in changes:
        with pytest.raises(ValueError, match=says):
            torch_distro.load_state_dict(module, {**state, **change})
    again = torch_distro.state_dict(module)
    assert all(
        torch.equal(again["residual"][name], kept) for name, kept in state["residual"].items()
    )
    dist.barrier()
    return True


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    run(2, _refused, options={"mode": "ef"})


def _exact(rank: int, size: int) -> bool:
    module, _ = _wrapped()
    with pytest.raises(ValueError, match="not compressed"):
        torch_distro.state_dict(module)
    return True


def test_an_exact_module_has_no_state() -> None:
    run(2, _exact, options={"mode": "dense"})
