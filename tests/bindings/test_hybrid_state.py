"""State of hybrid-sharded modules: the mean, the exchange's own state, checkpoints, a resume."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch_distro
from hybrid import KINDS, local, modes_of, net, replicas_of, shard, step
from models import batches
from ranks import run
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


def _module(kind: str, seed: int = 0) -> Any:  # noqa: ANN401
    module = net()
    torch.manual_seed(seed)
    for part in module:
        if isinstance(part, nn.Linear):
            part.reset_parameters()
    return shard(kind, module)


def _adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2)


def _ranks_state(rank: int, size: int, kind: str) -> dict[str, Any]:
    """A rank's own state and optimizer, taken up by another module before it trains."""
    data = batches(rank, 8)
    module = _module(kind)
    optimizer = _adamw(module)
    for x in data[:4]:
        step(module, optimizer, x)
    state = torch_distro.state_dict(module)
    saved = {"state": state, "modes": modes_of(module)}
    momenta = copy.deepcopy(optimizer.state_dict())
    resumed = _module(kind, 5)
    torch_distro.load_state_dict(resumed, state)
    saved["after"] = local(resumed)
    again = _adamw(resumed)
    again.load_state_dict(momenta)
    losses = [step(resumed, again, x) for x in data[4:]]
    torch_distro.average(resumed)
    return saved | {"averaged": local(resumed), "losses": losses}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_takes_up_its_own_state(kind: str) -> None:
    ran = run(4, _ranks_state, kind)
    for rank, own in enumerate(ran):
        other = ran[(rank + 2) % 4]
        assert own["modes"] == ["weights"]
        state = own["state"]
        names = [name for name in NAMES if name in state["reference"]]
        assert len(names) == len(state["reference"])
        parts = [
            state["reference"][name] + state["share"] * state["residual"][name] for name in names
        ]
        expected = torch.cat([part.reshape(-1) for part in parts])
        torch.testing.assert_close(own["after"], expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(own["after"], other["after"])  # its own, not the mean
        assert torch.equal(own["averaged"], other["averaged"])
        for name, reference in state["reference"].items():
            assert torch.equal(reference, other["state"]["reference"][name])


def _checkpoint(rank: int, size: int, kind: str, folder: str) -> dict[str, Any]:
    """The mean is saved; one module goes on, another begins from the checkpoint."""
    data = batches(rank, 8)
    module = _module(kind)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for x in data[:4]:
        step(module, optimizer, x)
    torch_distro.average(module)
    averaged = local(module)
    weights, moments = get_state_dict(module, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    losses = [step(module, optimizer, x) for x in data[4:]]

    resumed = _module(kind, 5)
    again = torch.optim.SGD(resumed.parameters(), lr=0.5)
    weights, moments = get_state_dict(resumed, again)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        resumed, again, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    loaded = local(resumed)
    resumed_losses = [step(resumed, again, x) for x in data[4:]]
    return {
        "averaged": averaged,
        "loaded": loaded,
        "losses": (losses, resumed_losses),
        "weights": (local(module), local(resumed)),
        "modes": modes_of(resumed),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_from_a_distributed_checkpoint_is_the_run_that_never_stopped(kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ran = run(4, _checkpoint, kind, folder)
    for own in ran:
        assert torch.equal(own["averaged"], own["loaded"])
        assert own["modes"] == ["weights"]
        assert own["losses"][0] == own["losses"][1]
        assert torch.equal(*own["weights"])


def _roll_back(rank: int, size: int, kind: str, in_place: bool, folder: str) -> dict[str, Any]:
    """A module in training is set back to what it was."""
    data = batches(rank, 8)
    module = _module(kind)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for x in data[:3]:
        step(module, optimizer, x)
    torch_distro.average(module)
    averaged = local(module)
    weights = get_model_state_dict(module)
    if in_place:  # of FSDP2 the state's tensors are the parameters
        dcp.save({"model": weights}, checkpoint_id=folder)
    else:
        weights = copy.deepcopy(weights)
    for x in data[3:6]:
        step(module, optimizer, x)
    if in_place:
        weights = get_model_state_dict(module)
        dcp.load({"model": weights}, checkpoint_id=folder)
    set_model_state_dict(module, weights)
    optimizer.zero_grad()
    back = local(module)
    module(data[6]).sum().backward()  # the last step's exchange, in which the mean is taken
    module(data[6]).sum().backward()  # with delay 1 it is due here
    return {"averaged": averaged, "back": back, "weights": local(module)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "checkpoint"])
def test_weights_that_are_loaded_in_the_midst_of_a_training_stay(kind: str, in_place: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ran = run(4, _roll_back, kind, in_place, folder)
    for own in ran:
        assert torch.equal(own["back"], own["averaged"])
        torch.testing.assert_close(own["weights"], own["averaged"], rtol=1e-6, atol=1e-7)


def _full_shard(kind: str) -> Any:  # noqa: ANN401
    if kind == "fsdp2":
        module = net()
        return fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=True)


def _average_exact(rank: int, size: int, kind: str, hybrid: bool) -> bool:
    module = _module(kind) if hybrid else _full_shard(kind)
    optimizer = _adamw(module)
    for x in batches(rank, 2):
        step(module, optimizer, x)
    before = local(module).clone()
    torch_distro.average(module)
    return torch.equal(before, local(module))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("hybrid", "mode"),
    [(False, "auto"), (True, "dense"), (True, "ef")],
    ids=["full", "dense", "ef"],
)
def test_the_mean_of_exact_shards_is_what_they_are(kind: str, hybrid: bool, mode: str) -> None:
    assert run(4, _average_exact, kind, hybrid, env={"DISTRO_MODE": mode}) == [True] * 4


def _no_state(rank: int, size: int, kind: str) -> str:
    module = _full_shard(kind)
    with pytest.raises(ValueError, match="not compressed") as raised:
        torch_distro.state_dict(module)
    return str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fully_sharded_module_has_no_state_of_an_exchange(kind: str) -> None:
    assert "hybrid sharding" in run(2, _no_state, kind)[0]


def _other_memory(rank: int, size: int) -> dict[str, Any]:
    module = _module("fsdp2")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = []
    for number, x in enumerate(batches(rank, 6)):
        if number == 3:
            weights = copy.deepcopy(module.state_dict())
            module.load_state_dict(weights, assign=True)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        losses.append(step(module, optimizer, x))
    checksum = torch_distro.stats(replicas_of(module))["reference_checksum"]
    torch_distro.average(module)
    return {"losses": losses, "checksum": checksum, "averaged": local(module)}


def test_the_exchange_follows_weights_into_other_memory() -> None:
    ran = run(4, _other_memory)
    for rank, own in enumerate(ran):
        other = ran[(rank + 2) % 4]
        assert own["losses"][-1] < own["losses"][0]
        assert own["checksum"] == other["checksum"]
        assert torch.equal(own["averaged"], other["averaged"])


def _save(rank: int, size: int, kind: str, folder: str, averaged: bool) -> int:
    """Saves twice; how often this rank's log speaks of it."""
    log = Path(folder) / f"rank{rank}.log"
    with log.open("w") as opened:
        os.dup2(opened.fileno(), 2)
    module = shard(kind, net())
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for x in batches(rank, 4):
        step(module, optimizer, x)
    if averaged:
        torch_distro.average(module)
    for number in range(2):
        state = {"model": get_model_state_dict(module)}
        dcp.save(state, checkpoint_id=f"{folder}/{number}")
    return log.read_text().count("average(module) on all ranks before a save")


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_replicas_that_differ_is_warned_of_once(
    kind: str, averaged: bool, tmp_path: Path
) -> None:
    assert sum(run(4, _save, kind, str(tmp_path), averaged)) == (0 if averaged else 1)
