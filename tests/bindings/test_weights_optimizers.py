"""`weights` mode under the optimizers of torch and the ways of using them."""

from __future__ import annotations

import torch
import torch_distro
from models import Mixed, batches, train, wrapped
from ranks import run
from torch.nn.parallel import DistributedDataParallel


def _skipping(rank: int, size: int) -> int:
    module = wrapped()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for step, x in enumerate(batches(rank, 6)):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        if not (rank == 1 and step < 2):  # as a GradScaler does on an overflow
            optimizer.step()
    return torch_distro.stats()["reference_checksum"]


def test_optimizer_steps_that_one_rank_skips_do_not_disturb() -> None:
    first, second = run(2, _skipping)
    assert first == second


def _rewrapped(rank: int, size: int) -> float:
    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(batches(rank, 1)[0]).square().mean().backward()
    optimizer.step()  # before the wrapper is there
    module = DistributedDataParallel(model)
    train(module, optimizer, batches(rank, 4))
    return torch_distro.state_dict(module)["share"]


def test_an_optimizer_that_stepped_before_the_module_was_wrapped_is_known() -> None:
    assert run(2, _rewrapped) == [0.5, 0.5]  # gain 1 over two ranks
