"""`weights` mode under real DDP: what is exchanged, when, and that all ranks agree.

All hold the same reference.
"""

from __future__ import annotations

import copy
import gc
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_distro
from models import Mixed, batches, flat, train, wrapped
from ranks import fail, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STEPS = 12


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    # The default eps is zero in fp16.
    return torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-4)


def _every_step(
    rank: int, size: int, options: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Mixed(unused=bool(options.get("find_unused_parameters"))).to(dtype)
    module = DistributedDataParallel(model, **options)
    checksums: list[int] = []
    losses = train(
        module,
        adamw(module),
        batches(rank, STEPS, dtype),
        lambda _: checksums.append(torch_distro.stats()["reference_checksum"]),
    )
    stats = torch_distro.stats()
    own = flat(module)
    torch_distro.average(module)
    return {
        "checksums": checksums,
        "losses": losses,
        "stats": stats,
        "own": own,
        "mean": flat(module),
    }


def _check(results: list[dict[str, Any]]) -> None:
    first = results[0]
    assert len(set(first["checksums"])) >= STEPS - 1
    for other in results[1:]:
        assert other["checksums"] == first["checksums"]
        assert torch.equal(other["mean"], first["mean"])
        assert not torch.equal(other["own"], first["own"])
    assert first["losses"][-1] < first["losses"][0]
    assert first["stats"]["exchanges"] == STEPS - 1
    assert first["stats"]["modules"][0]["mode"] == "weights"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"static_graph": True},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_ranks_hold_the_same_reference_at_every_step(options: dict[str, bool]) -> None:
    _check(run(2, _every_step, options, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_floating_type_is_exchanged(dtype: torch.dtype) -> None:
    _check(run(2, _every_step, {}, dtype))


@pytest.mark.parametrize("delay", ["0", "1"])
def test_four_ranks(delay: str) -> None:
    _check(run(4, _every_step, {}, torch.float32, env={"DISTRO_DELAY": delay}))


def _payload(rank: int, size: int) -> int:
    module = wrapped()
    train(module, adamw(module), batches(rank, 4))
    return torch_distro.stats()["payload_bytes_sent"]


def test_options_by_pg_options_win_over_the_environment() -> None:
    env = {"DISTRO_K": "6"}
    small = run(2, _payload, env=env)
    large = run(2, _payload, env=env, options={"k": 512, "transport": "ipc"})
    assert large[0] > 5 * small[0]


def _sgd(rank: int, size: int, backend: str) -> torch.Tensor:
    group = dist.group.WORLD if backend == "distro" else dist.new_group(backend=backend)
    options = torch_distro.Options(k=4096, value_bits=32, delay=0)
    if backend == "distro":
        group = dist.new_group(backend="distro", pg_options=options)
    module = wrapped(process_group=group)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    train(module, optimizer, batches(rank, 30))
    if backend == "distro":
        # The last step's moves are exchanged at the next training forward.
        module(batches(rank, 1)[0])
    return flat(module)


def test_everything_sent_with_sgd_is_gloos_training_to_rounding() -> None:
    distro = run(2, _sgd, "distro")
    gloo = run(2, _sgd, "gloo")
    assert torch.equal(distro[0], distro[1])
    assert (distro[0] - gloo[0]).abs().max() < 2e-6
    assert (gloo[0] - flat(Mixed()).mean()).abs().max() > 1e-2  # it did train


def _accumulate(rank: int, size: int) -> dict[str, Any]:
    module = wrapped()
    optimizer = adamw(module)
    for x, y in zip(batches(rank, 6), batches(rank + 50, 6), strict=True):
        optimizer.zero_grad()
        with module.no_sync():
            module(x).square().mean().backward()
        module(y).square().mean().backward()
        optimizer.step()
    stats = torch_distro.stats()
    return {"exchanges": stats["exchanges"], "checksum": stats["reference_checksum"]}


def test_accumulation_under_no_sync_exchanges_once_a_step() -> None:
    results = run(2, _accumulate)
    assert results[0] == results[1]
    assert results[0]["exchanges"] == 5


def _evaluate(rank: int, size: int) -> dict[str, Any]:
    module = wrapped()

    def evaluate(step: int) -> None:
        if rank == 1 and step % 2:
            module.eval()
            with torch.no_grad():
                for x in batches(7, 3):
                    module(x)
            module.train()

    train(module, adamw(module), batches(rank, STEPS), evaluate)
    stats = torch_distro.stats()
    return {"exchanges": stats["exchanges"], "checksum": stats["reference_checksum"]}


def test_evaluation_by_one_rank_between_steps_does_not_disturb_the_count() -> None:
    results = run(2, _evaluate)
    assert results[0] == results[1]


def _double_forward(rank: int, size: int) -> int:
    module = wrapped()
    optimizer = adamw(module)
    for x, y in zip(batches(rank, 5), batches(rank + 50, 5), strict=True):
        optimizer.zero_grad()
        (module(x).square().mean() + module(y).square().mean()).backward()
        optimizer.step()
    return torch_distro.stats()["exchanges"]


def test_two_forwards_before_one_backward_are_one_exchange() -> None:
    assert run(2, _double_forward, env={"TORCH_DISTRIBUTED_DEBUG": "OFF"}) == [4, 4]


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


def _zero(rank: int, size: int) -> dict[str, Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    module = wrapped()
    optimizer = ZeroRedundancyOptimizer(module.parameters(), torch.optim.AdamW, lr=1e-2)
    train(module, optimizer, batches(rank, 5))
    return {"weights": flat(module), "stats": torch_distro.stats()}


def test_a_sharded_optimizer_makes_the_module_exact() -> None:
    results = run(2, _zero)
    assert torch.equal(results[0]["weights"], results[1]["weights"])
    assert results[0]["stats"]["exchanges"] == 0
    assert results[0]["stats"]["modules"][0]["mode"] == "exact"
    assert "ZeroRedundancyOptimizer" in results[0]["stats"]["modules"][0]["reason"]


def _hooked(rank: int, size: int) -> dict[str, Any]:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    module = wrapped()
    module.register_comm_hook(dist.group.WORLD, default_hooks.allreduce_hook)
    train(module, adamw(module), batches(rank, 5))
    return {"weights": flat(module), "stats": torch_distro.stats()}


def test_a_communication_hook_of_the_script_is_respected() -> None:
    results = run(2, _hooked)
    assert torch.equal(results[0]["weights"], results[1]["weights"])
    assert results[0]["stats"]["modules"][0]["mode"] == "exact"


def _channels_last(rank: int, size: int) -> torch.Tensor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 40, 7), nn.ReLU(), nn.Conv2d(40, 8, 3)).to(
        memory_format=torch.channels_last
    )
    module = DistributedDataParallel(net)
    optimizer = adamw(module)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(5):
        optimizer.zero_grad()
        module(torch.randn(2, 3, 12, 12, generator=generator)).square().mean().backward()
        optimizer.step()
    torch_distro.average(module)
    weight = net.get_parameter("0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    return flat(module)


def test_weights_in_another_memory_order() -> None:
    results = run(2, _channels_last)
    assert torch.equal(results[0], results[1])


def _far_apart(rank: int, size: int) -> int:
    module = wrapped()
    train(
        module,
        adamw(module),
        batches(rank, 5),
        lambda step: time.sleep(3) if (step, rank) == (3, 1) else None,
    )
    return torch_distro.stats()["exchanges"]


def test_a_rank_that_ends_early_does_not_disturb_one_that_is_late() -> None:
    assert run(3, _far_apart) == [4, 4, 4]


def _resume(rank: int, size: int) -> dict[str, Any]:
    data = batches(rank, 10)
    module = wrapped()
    optimizer = adamw(module)
    train(module, optimizer, data[:5])
    state, script = torch_distro.state_dict(module), copy.deepcopy(optimizer.state_dict())
    if rank == 0:
        checkpoint: list[Any] = [copy.deepcopy(module.module.state_dict())]
    else:
        checkpoint = [None]
    dist.broadcast_object_list(checkpoint)
    resumed = wrapped(5)
    resumed.module.load_state_dict(checkpoint[0])  # rank 0's, as scripts do
    torch_distro.load_state_dict(resumed, state)
    assert state["reference"]["scale"].shape == torch.Size([])
    again = adamw(resumed)
    again.load_state_dict(script)
    train(resumed, again, data[5:])
    stats = torch_distro.stats()["modules"]
    torch_distro.average(resumed)
    return {"weights": flat(resumed), "exchanges": stats[1]["exchanges"]}


def test_a_resume_from_every_ranks_own_state() -> None:
    results = run(2, _resume)
    assert results[0]["exchanges"] == 8
    assert torch.equal(results[0]["weights"], results[1]["weights"])


def _non_finite(rank: int, size: int) -> bool:
    module = wrapped()

    def break_it(step: int) -> None:
        if rank == 1 and step == 4:
            with torch.no_grad():
                module.module.norm.bias[3] = float("nan")

    train(module, adamw(module), batches(rank, 9), break_it)
    return True


def test_a_non_finite_weight_is_an_error_on_all_ranks() -> None:
    for error in fail(2, _non_finite):
        assert error.kind == "DistBackendError"
        assert "rank 1" in error.message
        assert "norm.bias" in error.message
        assert "exchange 5" in error.message


def _uneven(rank: int, size: int) -> dict[str, Any]:
    from torch.distributed.algorithms.join import Join

    module = wrapped()
    optimizer = adamw(module)
    for epoch in range(2):
        with Join([module]):
            train(module, optimizer, batches(rank + 10 * epoch, 6 if rank == 0 else 1 + 2 * epoch))
    stats = torch_distro.stats()
    torch_distro.average(module)
    return {
        "weights": flat(module),
        "exchanges": stats["exchanges"],
        "resyncs": stats["resyncs"],
        "checksum": stats["reference_checksum"],
    }


@pytest.mark.parametrize("delay", ["0", "1"])
def test_join_with_uneven_inputs_over_two_epochs(delay: str) -> None:
    results = run(2, _uneven, env={"DISTRO_DELAY": delay})
    assert torch.equal(results[0].pop("weights"), results[1].pop("weights"))
    assert results[0] == results[1]
    assert results[0]["exchanges"] == 11
    assert results[0]["resyncs"] == 1  # join() copied one rank's weights to all after the first


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


class Buffered(nn.Module):
    """A module whose buffers DDP broadcasts at every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 300), nn.BatchNorm1d(300), nn.Linear(300, 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


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
    for error in fail(2, _broken_with_buffers):
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
    for messages in run(2, _catches):
        assert len(messages) >= 3
        assert all("scale" in message for message in messages)


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
