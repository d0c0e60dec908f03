"""What goes wrong with the weights of one rank is an error on all ranks that names it."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from models import Buffered, adamw, batches, train, wrapped
from ranks import fail, run
from torch.nn.parallel import DistributedDataParallel


def _non_finite(rank: int, size: int) -> bool:
    module = wrapped()

    def break_it(step: int) -> None:
        if rank == 1 and step == 4:
            with torch.no_grad():
                module.module.norm.bias[3] = float("nan")

    train(module, adamw(module), batches(rank, 9), break_it)
    return True


def test_a_non_finite_weight_is_an_error_on_all_ranks() -> None:
    for error in fail(2, _non_finite, options={"turns": 1}):
        assert error.kind == "DistBackendError"
        assert "rank 1" in error.message
        assert "norm.bias" in error.message
        assert "exchange 5" in error.message


def test_a_non_finite_weight_whose_turn_it_is_not_is_found_when_it_has_spread() -> None:
    for error in fail(2, _non_finite):
        assert error.kind == "DistBackendError"
        assert "rank 1" in error.message
        assert "non-finite weight" in error.message
        assert "exchange 5" in error.message or "exchange 6" in error.message


def _broken_with_buffers(rank: int, size: int) -> bool:
    torch.manual_seed(0)
    module = DistributedDataParallel(Buffered())

    def break_it(step: int) -> None:
        if rank == 1 and step == 4:
            with torch.no_grad():
                module.module.net[0].bias[3] = float("inf")

    try:
        train(module, adamw(module), batches(rank, 9), break_it)
    except dist.DistBackendError:
        time.sleep(3)  # a rank that stays alive after its error must not hold up the others
        raise
    return True


def test_a_non_finite_weight_is_named_where_ranks_wait_for_buffers() -> None:
    for error in fail(2, _broken_with_buffers, options={"turns": 1}):
        assert error.kind == "DistBackendError"
        assert "rank 1" in error.message
        assert "net.0.bias" in error.message


def _catches(rank: int, size: int) -> list[str]:
    module = wrapped()
    optimizer = adamw(module)
    messages = []
    for step, x in enumerate(batches(rank, 8)):
        try:
            train(module, optimizer, [x])
        except dist.DistBackendError as error:
            messages.append(str(error))
            continue
        if rank == 1 and step == 3:
            with torch.no_grad():
                module.module.scale.fill_(float("nan"))
    return messages


def test_a_script_that_catches_the_error_meets_it_again_instead_of_going_on_alone() -> None:
    for messages in run(2, _catches, options={"turns": 1}):
        assert len(messages) >= 3
        assert all("scale" in message for message in messages)
