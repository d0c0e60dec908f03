"""`weights` mode with several modules in a process, one after the other, in containers, saved."""

from __future__ import annotations

import copy
import gc
from typing import Any

import torch
import torch_distro
from models import Mixed, adamw, batches, flat, train, wrapped
from ranks import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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


def _copies(rank: int, size: int) -> dict[str, Any]:
    import io

    module = wrapped()
    train(module, adamw(module), batches(rank, 3))
    alone = [copy.deepcopy(module)] if rank == 0 else []  # for itself: not a module of the group
    copied = copy.deepcopy(module)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    other = wrapped(1)
    result: dict[str, Any] = {}
    for name, each in {"other": other, "copied": copied, "loaded": loaded, "old": module}.items():
        optimizer = adamw(each)
        train(each, optimizer, batches(rank, 6))
        result[name] = torch_distro.state_dict(each)["reference"]
    result["modules"] = torch_distro.stats()["modules"]
    result["alone"] = all(torch.isfinite(flat(each)).all() for each in alone)
    torch_distro.average(copied)
    result["mean"] = flat(copied)
    return result


def test_a_copied_or_unpickled_wrapper_is_exchanged_as_well() -> None:
    first, second = run(2, _copies)
    for name in ("other", "copied", "loaded", "old"):
        for parameter, reference in first[name].items():
            assert torch.equal(reference, second[name][parameter]), (name, parameter)
    assert not torch.equal(first["copied"]["first.weight"], first["old"]["first.weight"])
    assert torch.equal(first["mean"], second["mean"])
    assert first["modules"] == second["modules"]
    assert [m["exchanges"] for m in first["modules"]] == [8, 5, 5, 5]  # old, other, copied, loaded


def _wrapped_again(rank: int, size: int) -> dict[str, Any]:
    model = Mixed()
    checksums = []
    for trained in ("first", "second", "norm"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        module = DistributedDataParallel(model)
        train(module, torch.optim.Adam(module.parameters(), lr=1e-2), batches(rank, 4))
        torch_distro.average(module)
        checksums.append(torch_distro.stats()["reference_checksum"])
    return {"weights": flat(model), "checksums": checksums, "stats": torch_distro.stats()}


def test_one_model_wrapped_again_and_again_with_other_parameters_trained() -> None:
    first, second = run(2, _wrapped_again)
    assert torch.equal(first["weights"], second["weights"])
    assert first["checksums"] == second["checksums"]
    assert [module["exchanges"] for module in first["stats"]["modules"]] == [3, 3, 3]


def _second_wrapper(rank: int, size: int) -> bool:
    module = wrapped()
    train(module, adamw(module), batches(rank, 3))
    again = DistributedDataParallel(module.module)
    del again
    gc.collect()
    torch_distro.resync(module.module)  # raises if nobody is known to own its parameters
    torch_distro.average(module.module)
    residuals = torch_distro.state_dict(module)["residual"].values()
    assert all(residual.count_nonzero() == 0 for residual in residuals)
    return True


def test_a_second_wrapper_that_goes_leaves_the_first_in_charge() -> None:
    run(2, _second_wrapper)


class _Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 8, sparse=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(x))


def _sparse_gradients(rank: int, size: int) -> bool:
    torch.manual_seed(0)
    module = DistributedDataParallel(_Sparse())
    generator = torch.Generator().manual_seed(rank)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def backward() -> None:
        module(torch.randint(0, 100, (16,), generator=generator)).square().mean().backward()

    for _ in range(3):
        backward()
        optimizer.step()
        optimizer.zero_grad()
    # From an optimizer on that makes it exact, sparse buckets are reduced by the inner backend.
    torch.optim.LBFGS(module.module.out.parameters(), max_iter=1).step(lambda: torch.zeros(()))
    for _ in range(2):
        optimizer.zero_grad()
        backward()
    gradient: Any = module.module.table.weight.grad
    assert gradient.is_sparse
    return True


def test_sparse_gradients_of_a_module_that_becomes_exact() -> None:
    run(2, _sparse_gradients)
