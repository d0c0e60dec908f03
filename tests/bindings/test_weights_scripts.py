"""`weights` mode under what scripts do around a step beyond the optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_distro
from models import Buffered, Mixed, adamw, batches, flat, train, wrapped
from ranks import RankError, launch, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint


class Checkpointed(nn.Module):
    """Two blocks whose activations are computed again in the backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(20, 90), nn.Tanh(), nn.Linear(90, 20)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()  # as an embedding's output would; reentrant ones need it
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def _checkpointing(rank: int, size: int) -> dict[str, Any]:
    results = {}
    for reentrant in (False, True):
        torch.manual_seed(0)
        module = DistributedDataParallel(Checkpointed(reentrant), static_graph=reentrant)
        train(module, adamw(module), [x.clone() for x in batches(rank, 6)])
        exchanges = torch_distro.state_dict(module)["exchanges"]
        torch_distro.average(module)
        results[reentrant] = (exchanges, flat(module))
    return results  # type: ignore[return-value]


def test_activation_checkpointing_of_both_kinds() -> None:
    first, second = run(2, _checkpointing)
    for reentrant in (False, True):
        assert first[reentrant][0] == 5
        assert torch.equal(first[reentrant][1], second[reentrant][1])


def _ema(rank: int, size: int) -> dict[str, Any]:
    module = wrapped()
    average = AveragedModel(module.module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = adamw(module)
    swaps = []

    def swap(step: int) -> None:
        average.update_parameters(module.module)
        if step % 3 == 2 and rank == 0:  # an evaluation of the average, on one rank
            own = copy.deepcopy(module.module.state_dict())
            module.module.load_state_dict(average.module.state_dict())
            with torch.no_grad():
                swaps.append(module(batches(7, 1)[0]).sum().item())
            module.module.load_state_dict(own)

    train(module, optimizer, batches(rank, 9), swap)
    undone = torch_distro.stats()["resyncs"]
    module.module.load_state_dict(average.module.state_dict())  # and kept
    train(module, optimizer, batches(rank, 3))
    stats = torch_distro.stats()
    return {
        "swaps": len(swaps),
        "finite": bool(torch.isfinite(flat(average)).all()),
        "undone": undone,
        "kept": stats["resyncs"],
        "checksum": stats["reference_checksum"],
    }


def test_an_average_of_weights_swapped_in_and_out_for_an_evaluation_costs_nothing() -> None:
    first, second = run(2, _ema)
    assert first.pop("swaps") == 3
    assert second.pop("swaps") == 0
    assert first == second
    assert first["finite"]
    assert first["undone"] == 0
    assert first["kept"] == 1


def _frozen(rank: int, size: int) -> dict[str, Any]:
    module = wrapped(find_unused_parameters=True)
    optimizer = adamw(module)
    data = batches(rank, 20)
    train(module, optimizer, data[:6])
    weight = module.module.first.weight
    weight.requires_grad_(False)
    train(module, optimizer, data[6:10])
    resting = weight.clone()
    train(module, optimizer, data[10:14])
    rested = torch.equal(weight, resting)
    others = module.module.second.weight.detach().clone()
    weight.requires_grad_(True)
    train(module, optimizer, data[14:18])
    stats = torch_distro.stats()
    torch_distro.average(module)
    return {
        "resting": resting,
        "rested": rested,
        "moved_again": not torch.equal(weight, resting),
        "others_moved": not torch.equal(others, module.module.second.weight),
        "resyncs": stats["resyncs"],
        "weights": flat(module),
    }


def test_a_parameter_that_is_frozen_rests_at_the_mean_of_the_ranks() -> None:
    first, second = run(2, _frozen)
    assert torch.equal(first["resting"], second["resting"])
    assert torch.equal(first["weights"], second["weights"])
    for result in (first, second):
        assert result["rested"]
        assert result["moved_again"]
        assert result["others_moved"]
        assert result["resyncs"] == 1


def _toggled(rank: int, size: int) -> dict[str, Any]:
    """A discriminator: frozen while the generator passes through it, trained otherwise."""
    judge = wrapped()
    maker = wrapped(1)
    one, two = adamw(judge), adamw(maker)
    for x in batches(rank, 6):
        judge.module.requires_grad_(False)
        judge.module.frozen.requires_grad_(False)
        judge(maker(x)).square().mean().backward()
        two.step()
        two.zero_grad()
        judge.module.requires_grad_(True)
        judge.module.frozen.requires_grad_(False)
        judge(x).square().mean().backward()
        one.step()
        one.zero_grad()
    return torch_distro.stats()


def test_freezing_a_module_for_the_pass_of_another_is_no_freezing() -> None:
    first, second = run(2, _toggled)
    assert first["resyncs"] == 0
    assert first["reference_checksum"] == second["reference_checksum"]
    assert [module["exchanges"] for module in first["modules"]] == [5, 5]


LIMIT = 0.05


def _clamped(rank: int, size: int) -> dict[str, Any]:
    module = wrapped()

    def clamp(_: int) -> None:
        with torch.no_grad():
            for p in module.parameters():
                p.clamp_(-LIMIT, LIMIT)

    clamp(0)  # it begins within the bound
    optimizer = adamw(module)
    left = []
    for x in batches(rank, 40):
        train(module, optimizer, [x], clamp)
        module.eval()
        module(x)  # a sync point: what the exchange leaves
        module.train()
        left.append(flat(module).abs().max().item() / LIMIT)
    torch_distro.average(module)
    return {"left": left, "weights": flat(module)}


def test_clamped_weights_leave_the_bound_by_a_few_steps_only_and_ranks_stay_together() -> None:
    first, second = run(2, _clamped)
    assert torch.equal(first["weights"], second["weights"])
    beyond = max(first["left"] + second["left"])
    print(f"largest weight that an exchange leaves: {beyond:.2f} of the bound, the step being 0.2")
    assert beyond < 2.0


def _converted(rank: int, size: int) -> dict[str, Any]:
    module = wrapped()
    train(module, adamw(module), batches(rank, 4))
    module.to(torch.float64)
    train(module, adamw(module), batches(rank, 4, torch.float64))
    stats = torch_distro.stats()
    torch_distro.average(module)
    return {"weights": flat(module), "checksum": stats["reference_checksum"]}


def test_a_module_converted_to_another_dtype_in_the_middle() -> None:
    first, second = run(2, _converted)
    assert first["checksum"] == second["checksum"]
    assert torch.equal(first["weights"], second["weights"])


class Fragile(Mixed):
    """Fails on a batch that begins with a not-a-number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.isnan(x[0, 0]):
            raise ValueError("a bad batch")
        return super().forward(x)


def _bad_batch(rank: int, size: int, caught: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    module = DistributedDataParallel(Fragile())
    optimizer = adamw(module)
    data = batches(rank, 9)
    if rank == 1:
        data[4][0, 0] = float("nan")
    for x in data:
        try:
            train(module, optimizer, [x])
        except ValueError:
            if not caught:
                raise
    checksum = torch_distro.stats()["reference_checksum"]
    torch_distro.average(module)
    return {"weights": flat(module), "checksum": checksum}


def test_an_exception_in_one_ranks_forward_is_an_error_on_the_others() -> None:
    first, second = launch(2, _bad_batch, False)
    assert isinstance(second, RankError)
    assert second.kind == "ValueError"
    assert isinstance(first, RankError)
    assert first.kind == "DistBackendError"
    assert "rank 1" in first.message


def test_a_batch_that_one_rank_skips_because_its_forward_failed_leaves_ranks_together() -> None:
    first, second = run(2, _bad_batch, True)
    assert torch.equal(first["weights"], second["weights"])


def _buffers(rank: int, size: int) -> dict[bool, Any]:
    results = {}
    for broadcast in (True, False):
        torch.manual_seed(0)
        module = DistributedDataParallel(Buffered(), broadcast_buffers=broadcast)
        train(module, adamw(module), batches(rank, 6))
        exact = torch_distro.stats()["exact"]
        exchanges = torch_distro.state_dict(module)["exchanges"]
        with torch.no_grad():
            module(batches(rank, 1)[0])
        torch_distro.average(module)
        mean = dict(module.module.named_buffers())["net.1.running_mean"].clone()
        results[broadcast] = {
            "exact": exact,
            "exchanges": exchanges,
            "mean": mean,
            "weights": flat(module),
        }
    return results


def test_batch_norm_with_and_without_broadcast_buffers() -> None:
    first, second = run(2, _buffers)
    for broadcast in (True, False):
        assert first[broadcast]["exchanges"] == 5
        assert torch.equal(first[broadcast]["weights"], second[broadcast]["weights"])
        assert not torch.equal(first[broadcast]["mean"], second[broadcast]["mean"])
    with_broadcast = first[True]["exact"]
    print("exact collectives:", with_broadcast, "and then", first[False]["exact"] - with_broadcast)


def _evaluated(rank: int, size: int) -> dict[str, Any]:
    module = wrapped()
    optimizer = adamw(module)
    train(module, optimizer, batches(rank, 5))
    if rank == 0:
        module.eval()
        for x in batches(7, 2):
            module(x)  # with gradients enabled
        module.train()
    torch_distro.average(module)
    mean = flat(module)
    train(module, optimizer, batches(rank, 4))
    return {"mean": mean, "checksum": torch_distro.stats()["reference_checksum"]}


def test_average_after_one_rank_has_evaluated_with_gradients_enabled() -> None:
    first, second = run(2, _evaluated)
    assert torch.equal(first["mean"], second["mean"])
    assert first["checksum"] == second["checksum"]


def _interleaved(rank: int, size: int) -> str:
    module = wrapped()
    train(module, adamw(module), batches(rank, 3))
    one, two, three = batches(rank, 3)
    a, b = module(one).mean(), module(two).mean()
    a.backward()
    module(three)  # a sync point: the exchange writes the weights that b's graph holds
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as error:
        b.backward()
    return str(error.value)


def test_a_graph_that_is_kept_across_a_sync_point_is_autograds_error_and_not_a_wrong_gradient() -> (
    None
):
    for message in run(2, _interleaved):
        assert "inplace" in message
