"""`weights` mode with several modules in a process, one after the other, in containers, saved."""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch_distro
from models import adamw, batches, flat, train, wrapped
from ranks import run
from torch import nn

STEPS = 12


def _two_modules(rank: int, size: int) -> dict[str, Any]:
    first, second = wrapped(0), wrapped(1)
    one, two = adamw(first), torch.optim.SGD(second.parameters(), lr=0.01)
    for x in batches(rank, STEPS):
        for module, optimizer in ((first, one), (second, two)):
            train(module, optimizer, [x])
    stats = torch_distro.stats()
    torch_distro.average(first)
    torch_distro.average(second)
    return {"stats": stats, "first": flat(first), "second": flat(second)}


def test_two_modules_in_one_process() -> None:
    results = run(2, _two_modules)
    assert [m["exchanges"] for m in results[0]["stats"]["modules"]] == [STEPS - 1] * 2
    for name in ("first", "second"):
        assert torch.equal(results[0][name], results[1][name])


def _folds(rank: int, size: int) -> dict[str, Any]:
    checksums = []
    for fold in range(3):
        module = wrapped(fold)
        train(module, adamw(module), batches(rank, 4))
        checksums.append(torch_distro.stats()["reference_checksum"])
        del module
        gc.collect()
    from torch_distro._attach import _attachments

    recorded = torch_distro.stats()["modules"]
    return {
        "checksums": checksums,
        "alive": len(_attachments),
        "exchanges": [module["exchanges"] for module in recorded],
    }


def test_fold_after_fold_leaves_nothing_behind() -> None:
    results = run(2, _folds)
    assert results[0] == results[1]
    assert results[0]["alive"] == 0
    assert results[0]["exchanges"] == [3, 3, 3]


def _pickled(rank: int, size: int) -> bool:
    import io

    module = wrapped()
    train(module, adamw(module), batches(rank, 3))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.equal(flat(torch.load(buffer, weights_only=False)), flat(module))


def test_a_wrapped_module_can_be_saved_whole_and_loaded() -> None:
    assert run(2, _pickled) == [True, True]


def _averaged_container(rank: int, size: int) -> list[torch.Tensor]:
    several = nn.ModuleList([wrapped(seed) for seed in range(6)])
    for module in several:
        train(module, adamw(module), batches(rank, 3))
    torch_distro.average(several)
    return [flat(module) for module in several]


def test_average_of_a_container_takes_its_modules_in_one_order_on_all_ranks() -> None:
    first, second = run(2, _averaged_container)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _average_any(rank: int, size: int) -> torch.Tensor:
    net = nn.Linear(3, 3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(float(rank))
    torch_distro.average(net)
    return flat(net)


def test_average_works_on_a_module_that_is_not_wrapped() -> None:
    for weights in run(2, _average_any):
        assert set(weights.tolist()) == {0.5}
