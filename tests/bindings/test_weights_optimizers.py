"""`weights` mode under the optimizers of torch and the ways of using them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch_distro
from models import Mixed, adamw, batches, flat, train, wrapped
from ranks import run
from torch import nn
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
    return torch_distro.state_dict(module)["share"]  # gain / ranks


def test_an_optimizer_that_stepped_before_the_module_was_wrapped_is_known() -> None:
    assert run(2, _rewrapped) == [0.5, 0.5]  # gain 1 over two ranks


class Recipe(NamedTuple):
    """An optimizer, or several over one module, and the gain that follows from its class."""

    make: Callable[[nn.Module], list[torch.optim.Optimizer]]
    normalises: bool


def _one(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[..., Any]:  # noqa: ANN401
    return lambda module: [kind(module.parameters(), **options)]


def _muon(module: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in module.parameters() if p.ndim == 2 and p.requires_grad]
    others = [p for p in module.parameters() if p.ndim != 2 and p.requires_grad]
    return [torch.optim.Muon(matrices, lr=2e-2), torch.optim.AdamW(others, lr=1e-2)]


class HandWritten(torch.optim.Optimizer):
    """A script's own, of which nothing is known."""

    def __init__(self, parameters: Any) -> None:  # noqa: ANN401
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign() * group["lr"])


RECIPES = {
    "sgd": Recipe(_one(torch.optim.SGD, lr=0.05), False),
    "momentum": Recipe(_one(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True), False),
    "asgd": Recipe(_one(torch.optim.ASGD, lr=0.05), False),
    "rprop": Recipe(_one(torch.optim.Rprop, lr=1e-3), True),
    "adagrad": Recipe(_one(torch.optim.Adagrad, lr=1e-2), True),
    "adafactor": Recipe(_one(torch.optim.Adafactor, lr=1e-2), True),
    "muon": Recipe(_muon, True),
    "fused": Recipe(_one(torch.optim.AdamW, lr=1e-2, fused=True), True),
    "foreach": Recipe(_one(torch.optim.AdamW, lr=1e-2, foreach=True), True),
    "own": Recipe(lambda module: [HandWritten(module.parameters())], True),
}


def _optimizers(rank: int, size: int, names: list[str]) -> dict[str, Any]:
    results = {}
    for name in names:
        module = wrapped()
        optimizers = RECIPES[name].make(module)
        losses = []
        for step, x in enumerate(batches(rank, 8)):
            loss = (module(x) - x.roll(1, 1)).square().mean()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=step % 2 == 0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.item())
        share = torch_distro.state_dict(module)["share"]
        torch_distro.average(module)
        results[name] = {"share": share, "weights": flat(module), "losses": losses}
    return results


def test_optimizers_of_torch_with_clipping_keep_ranks_together_and_get_their_gain() -> None:
    first, second = run(2, _optimizers, list(RECIPES))
    for name, recipe in RECIPES.items():
        assert torch.equal(first[name]["weights"], second[name]["weights"]), name
        # share = gain / 2
        assert first[name]["share"] == pytest.approx(2**-0.5 if recipe.normalises else 0.5), name
        assert first[name]["losses"][-1] < first[name]["losses"][0], name


def _scaler(rank: int, size: int) -> dict[str, Any]:
    module = wrapped()
    optimizer = adamw(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    taken = []
    for step, x in enumerate(batches(rank, 8)):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (module(x) - x.roll(1, 1)).square().mean()
        scaler.scale(loss).backward()
        if rank == 1 and step in (0, 3, 4):
            module.module.first.weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        before = flat(module)
        scaler.step(optimizer)
        scaler.update()
        taken.append(not torch.equal(before, flat(module)))
    state = torch_distro.state_dict(module)
    torch_distro.average(module)
    return {
        "taken": taken,
        "reference": state["reference"],
        "exchanges": state["exchanges"],
        "weights": flat(module),
    }


def test_an_overflow_on_one_rank_skips_its_step_only_and_ranks_stay_together() -> None:
    first, second = run(2, _scaler)
    assert first["taken"] == [True] * 8
    assert second["taken"] == [False, True, True, False, False, True, True, True]
    assert first["exchanges"] == second["exchanges"] == 7
    for name, reference in first["reference"].items():
        assert torch.equal(reference, second["reference"][name]), name
    assert torch.equal(first["weights"], second["weights"])


def _compiled(rank: int, size: int) -> dict[str, Any]:
    torch._dynamo.reset()
    module = wrapped()
    optimizer = adamw(module)
    compiled: Any = torch.compile(module, backend="eager")

    @torch.compile(backend="eager")
    def step() -> None:
        optimizer.step()

    for x in batches(rank, 6):
        loss = (compiled(x) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        step()
    state = torch_distro.state_dict(module)
    torch_distro.average(compiled)
    return {"share": state["share"], "exchanges": state["exchanges"], "weights": flat(module)}


def test_a_compiled_module_and_a_compiled_step() -> None:
    first, second = run(2, _compiled)
    assert torch.equal(first["weights"], second["weights"])
    assert first["exchanges"] == 5
    assert first["share"] == pytest.approx(2**-0.5)  # the optimizer has been seen


def _sharpness_aware(rank: int, size: int) -> dict[str, Any]:
    module = wrapped()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    trained = [p for p in module.parameters() if p.requires_grad]
    losses = []
    for x in batches(rank, 10):
        loss = (module(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        with torch.no_grad():
            saved = [p.clone() for p in trained]
            for p in trained:
                p.add_(p.grad, alpha=0.01)  # type: ignore[arg-type]
        optimizer.zero_grad()
        with module.no_sync():  # at the weights that are taken back, nothing is exchanged
            (module(x) - x.roll(1, 1)).square().mean().backward()
        with torch.no_grad():
            for p, weights in zip(trained, saved, strict=True):
                p.copy_(weights)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    exchanges = torch_distro.stats()["exchanges"]
    torch_distro.average(module)
    return {"losses": losses, "weights": flat(module), "exchanges": exchanges}


def test_two_passes_a_step_the_one_at_other_weights_under_no_sync() -> None:
    first, second = run(2, _sharpness_aware)
    assert torch.equal(first["weights"], second["weights"])
    assert first["losses"][-1] < first["losses"][0]
    assert first["exchanges"] == 9
