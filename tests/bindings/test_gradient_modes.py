"""Modes ef and demo: DDP's gradients are compressed, in every way that DDP reduces them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_distro
from gradient_models import (
    DENSE,
    Net,
    backward,
    beside_gloo,
    data,
    gradients,
    model,
    reductions,
    same_everywhere,
    steps,
    weights,
)
from ranks import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

ROUNDING = {
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}
"""Differences of weights after three steps. fp64 gradients are exchanged in fp32."""


def _accumulate(module: DistributedDataParallel, rank: int) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(2):
        with module.no_sync():
            backward(module, data(rank, 10 + step))
        backward(module, data(rank, step))
        optimizer.step()
        optimizer.zero_grad()


def _uneven(module: DistributedDataParallel, rank: int) -> None:
    with module.join():
        steps(module, rank, 2 + 2 * rank)


def _reentrant(module: DistributedDataParallel, rank: int) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        backward(module, data(rank, step).requires_grad_())
        optimizer.step()


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 3),
    "bucket views": ({"gradient_as_bucket_view": True}, 3),
    "static graph": ({"static_graph": True}, 3),
    "several buckets": ({"bucket_cap_mb": 0.02}, 5),  # one, then two
    "unused parameters": (
        {"find_unused_parameters": True, "model_options": {"uses_all": False}},
        3,
    ),
    "no_sync": ({"training": _accumulate}, 2),
    "uneven inputs": ({"training": _uneven}, 4),
    "reentrant checkpoint": (
        {"training": _reentrant, "model_options": {"reentrant": True}},
        3,
    ),
}  # fmt: skip


def _ways(rank: int, size: int) -> bool:
    for name, (given, count) in CASES.items():
        options = {"training": steps, **given}
        with reductions(count):
            distro, gloo = beside_gloo(rank, **options)
        torch.testing.assert_close(
            distro,
            gloo,
            rtol=0,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",  # type: ignore[misc]
        )
        assert same_everywhere(distro), name
    for dtype, difference in ROUNDING.items():
        distro, gloo = beside_gloo(rank, steps, dtype)
        torch.testing.assert_close(distro, gloo, rtol=0, atol=difference)
    entries = torch_distro.stats()["modules"]
    assert {entry["mode"] for entry in entries} == {"ef"}
    return True


def test_ef_that_sends_everything_trains_ddp_as_gloo_does_to_rounding() -> None:
    run(2, _ways, options=DENSE)


class _Streams(nn.Module):
    """Layers of one shape, each of which sees other inputs, so that its gradient is 0 elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 64, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for i, layer in enumerate(self.layers):
            seen = torch.zeros_like(x)
            seen[:, 32 * i : 32 * i + 32] = x[:, 32 * i : 32 * i + 32]
            outputs.append(layer(seen))
        return torch.stack(outputs)


def _drain(rank: int, size: int) -> bool:
    torch.manual_seed(1)
    # Small buckets, which DDP rebuilds in another order after the first backward.
    module = DistributedDataParallel(_Streams(), bucket_cap_mb=0.03)
    generator = torch.Generator().manual_seed(rank)
    totals = [torch.zeros(64, 128) for _ in range(4)]
    for step in range(8):
        module.zero_grad()
        x = torch.randn(8, 128, generator=generator) if step == 0 else torch.zeros(8, 128)
        module(x).square().sum().backward()
        for i, layer in enumerate(module.module.layers):
            gradient = layer.weight.grad
            outside = torch.ones(128, dtype=torch.bool)
            outside[32 * i : 32 * i + 32] = False
            assert not gradient[:, outside].any(), f"step {step}: layer {i} got another's"
            totals[i] += gradient
    # In the end everything has been sent: the sum is the mean gradient of the first step.
    alone = _Streams()
    alone.load_state_dict(module.module.state_dict())
    alone(
        torch.randn(8, 128, generator=torch.Generator().manual_seed(rank))
    ).square().sum().backward()
    for layer, total in zip(alone.layers, totals, strict=True):
        dist.all_reduce(layer.weight.grad)  # type: ignore[arg-type]
        torch.testing.assert_close(total, layer.weight.grad / size, rtol=1e-5, atol=1e-5)  # type: ignore[operator]
    return True


def test_residuals_belong_to_parameters_and_survive_the_rebuilding_of_buckets() -> None:
    run(2, _drain, options={"mode": "ef", "k": 256, "value_bits": 32, "transform": "none"})


def _non_finite(rank: int, size: int) -> bool:
    module = DistributedDataParallel(model())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    scale, skipped = 2.0, []
    for step in range(6):
        optimizer.zero_grad()
        loss = (module(data(rank, step)) - data(rank, step).roll(1, 1)).square().mean() * scale
        if step == 2 and rank == 1:
            handle = module.module.first.weight.register_hook(lambda g: g * float("inf"))
        loss.backward()
        if step == 2 and rank == 1:
            handle.remove()
        bad = [n for n, p in module.module.named_parameters() if not p.grad.isfinite().all()]
        if bad:
            assert bad == ["first.weight"], bad
            skipped.append(step)
            scale /= 2
        else:
            optimizer.step()
    assert skipped == [2]
    assert weights(module).isfinite().all()
    assert same_everywhere(weights(module))
    return True


@pytest.mark.parametrize("mode", ["ef", "demo"])
def test_a_non_finite_gradient_is_seen_by_all_ranks_and_the_next_step_goes_on(mode: str) -> None:
    run(2, _non_finite, options={"mode": mode, "k": 64})


def _learn(rank: int, size: int, lr: float) -> tuple[list[float], dict[str, Any]]:
    module = DistributedDataParallel(model())
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        loss = (module(data(rank, step % 4)) - data(rank, step % 4).roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert same_everywhere(weights(module))
    return losses, torch_distro.stats()


@pytest.mark.parametrize(("mode", "lr"), [("ef", 0.3), ("demo", 0.003)])
def test_plain_sgd_learns_on_a_fraction_of_the_bytes(mode: str, lr: float) -> None:
    outcomes = run(2, _learn, lr, options={"mode": mode, "k": 64})
    for losses, stats in outcomes:
        assert sum(losses[-4:]) < 0.8 * sum(losses[:4]), losses
        assert stats["exchanges"] == stats["reductions"] == 60
        assert stats["gradient_bytes"] == 60 * 4 * sum(p.numel() for p in Net().parameters())
        assert stats["payload_bytes_sent"] < stats["gradient_bytes"] / 20
        assert stats["modules"][0]["mode"] == mode
        assert stats["modules"][0]["exchanges"] == 60
        assert stats["encode_seconds"] > 0
        assert stats["decode_seconds"] > 0
        assert stats["wait_seconds"] > 0
    assert outcomes[0][1]["reference_checksum"] == outcomes[1][1]["reference_checksum"]


def _small(rank: int, size: int) -> bool:
    with reductions(0):
        distro, gloo = beside_gloo(rank, steps)
    # Divided before the sum here as there, so the same bits.
    assert torch.equal(distro, gloo)
    return True


def test_buckets_below_the_least_size_are_exact() -> None:
    run(2, _small, options={"mode": "ef", "min_elements": 20_000})


def _compiled(rank: int, size: int) -> bool:
    torch.manual_seed(0)
    module = DistributedDataParallel(model())
    compiled = torch.compile(module, backend="aot_eager")
    with reductions(2):
        for step in range(2):
            module.zero_grad()
            backward(compiled, data(rank, step))  # type: ignore[arg-type]
    own = gradients(module)
    module.zero_grad()
    with reductions(1):
        backward(module, data(rank, 1))
    torch.testing.assert_close(own, gradients(module), rtol=1e-5, atol=1e-6)
    return True


def test_a_compiled_module_is_compressed_as_well() -> None:
    run(2, _compiled, options=DENSE)


def _other_orders(rank: int, size: int) -> bool:
    x = torch.arange(8192.0).reshape(128, 64).t() * (rank + 1)
    expected = torch.arange(8192.0).reshape(128, 64).t() * 3
    dist.all_reduce(x)
    assert torch.equal(x, expected)
    torch.manual_seed(0)
    net = nn.Conv2d(32, 64, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        module(torch.randn(2, 32, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch_distro.average(module)
    assert torch_distro.stats()["exchanges"] > 0
    return True


def test_dense_tensors_in_any_order_of_dimensions_are_reduced() -> None:
    run(2, _other_orders, options={"mode": "ef"})
