"""CUDA tensors: exact collectives, stream order, weights mode on the GPU and beside the CPU.

Ranks share the GPU where there is one, and so stage; with two GPUs they use NCCL as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch_distro
from models import Mixed, batches, flat, train
from torch.nn.parallel import DistributedDataParallel

# A process that was forked from one that has looked for GPUs, as imports of torch do, has none.
run = partial(ranks.run, start="spawn")

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() == 0, reason="no CUDA device (torch.cuda.device_count() is 0)"
)
two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices, one for each rank's NCCL"
)

# Some tenths of a second on any GPU: what reads a result too early reads something else.
LONG_CYCLES = 300_000_000


def _device(rank: int) -> torch.device:
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _collectives(rank: int, size: int, device: torch.device) -> list[torch.Tensor]:
    """Results of every exact collective, in one order, on one device."""

    def make(seed: int, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        # Small whole numbers: sums are exact, whatever order a backend adds in.
        return torch.randint(-8, 9, shape, generator=generator).float().to(device)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device)

    results = []
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.AVG):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64):
            x = make(rank, 5, 3).to(dtype) * 2
            dist.all_reduce(x, op)
            results.append(x)
    bits = torch.tensor([1 << rank], device=device)
    dist.all_reduce(bits, dist.ReduceOp.BOR)
    results.append(bits)
    x = make(rank, 5, 3)
    dist.broadcast(x, src=size - 1)
    results.append(x)
    x = make(rank, 5, 3)
    dist.reduce(x, dst=0)
    results += [x] if rank == 0 else []
    gathered = [empty(5, 3) for _ in range(size)]
    dist.all_gather(gathered, make(rank, 5, 3))
    results += gathered
    whole = empty(5 * size, 3)
    dist.all_gather_into_tensor(whole, make(rank, 5, 3))
    results.append(whole)
    part = empty(5, 3)
    dist.reduce_scatter(part, [make(rank + 10 * i, 5, 3) for i in range(size)])
    results.append(part)
    part = empty(5, 3)
    dist.reduce_scatter_tensor(part, make(rank, 5 * size, 3), dist.ReduceOp.AVG)
    results.append(part)
    root = [empty(5, 3) for _ in range(size)] if rank == 0 else None
    dist.gather(make(rank, 5, 3), root, dst=0)
    results += root or []
    part = empty(5, 3)
    dist.scatter(part, [make(i, 5, 3) for i in range(size)] if rank == 1 else None, src=1)
    results.append(part)
    exchanged = empty(size, 3)
    dist.all_to_all_single(exchanged, make(rank, size, 3))
    results.append(exchanged)
    received = empty(100_000)
    other = 1 - rank
    operations = [
        dist.P2POp(dist.isend, torch.full((100_000,), float(rank), device=device), other),
        dist.P2POp(dist.irecv, received, other),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    results.append(received)
    dist.barrier()
    return results


def _as_on_the_cpu(rank: int, size: int) -> bool:
    expected = _collectives(rank, size, torch.device("cpu"))
    actual = _collectives(rank, size, _device(rank))
    for left, right in zip(expected, actual, strict=True):
        assert right.is_cuda
        assert torch.equal(left, right.cpu())
    everything: list[object] = [None] * size
    dist.all_gather_object(everything, rank)
    assert everything == list(range(size))
    return True


# One rank a GPU where there are two, and all on the first.
@pytest.mark.parametrize(
    "visible", [pytest.param(None, marks=two_gpus, id="nccl"), pytest.param("0", id="staged")]
)
def test_every_collective_gives_what_it_gives_on_the_cpu(visible: str | None) -> None:
    run(2, _as_on_the_cpu, env=_visible(visible))


def _visible(devices: str | None) -> dict[str, str]:
    if devices is None:
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": seen.split(",")[0] if seen else devices}


def _in_order(rank: int, size: int) -> bool:
    device = _device(rank)
    total = sum(range(size))
    collectives: list[tuple[str, Callable[[torch.Tensor], Any], float]] = [
        ("sum", lambda x: dist.all_reduce(x, async_op=True), total),
        ("mean", lambda x: dist.all_reduce(x, dist.ReduceOp.AVG, async_op=True), total / size),
        ("broadcast", lambda x: dist.broadcast(x, src=1, async_op=True), 1.0),
    ]
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            for name, collective, expected in collectives:
                x = torch.full((1 << 20,), -1.0, device=device)
                torch.cuda._sleep(LONG_CYCLES)
                x.fill_(float(rank))  # behind the long kernel
                collective(x).wait()
                assert x.eq(expected).all().item(), name
                # What is enqueued after wait() sees the result, by the future as well.
                y = torch.full((1 << 20,), float(rank), device=device)
                torch.cuda._sleep(LONG_CYCLES)
                y.add_(1.0)
                future = dist.all_reduce(y, async_op=True).get_future()
                doubled = future.then(lambda done: done.value()[0] * 2)
                assert doubled.wait().eq(2.0 * (total + size)).all().item()
    # The memory of a tensor that the script drops is not given to another before its time.
    work = dist.all_reduce(torch.full((1 << 22,), float(rank), device=device), async_op=True)
    noise = [torch.full((1 << 22,), 7.0, device=device) for _ in range(4)]
    result = work.get_future().wait()[0]
    assert result.eq(float(total)).all().item()
    assert all(n.eq(7.0).all().item() for n in noise)
    return True


@pytest.mark.parametrize(
    "visible", [pytest.param(None, marks=two_gpus, id="nccl"), pytest.param("0", id="staged")]
)
def test_collectives_keep_the_order_of_the_stream(visible: str | None) -> None:
    run(2, _in_order, env=_visible(visible))


def _mixed(rank: int, size: int, devices: list[str], dtype: torch.dtype) -> dict[str, Any]:
    device = torch.device(devices[rank])
    if device.type == "cuda":
        device = _device(rank)
    torch.manual_seed(0)
    module = DistributedDataParallel(Mixed().to(device=device, dtype=dtype))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-4)
    checksums: list[int] = []

    def after(step: int) -> None:
        checksums.append(torch_distro.stats()["reference_checksum"])
        if step == 4 and rank == 0:
            torch_distro.resync(module)

    data = [x.to(device) for x in batches(rank, 10, dtype)]
    losses = train(module, optimizer, data, after)
    saved = torch_distro.state_dict(module)
    stats = torch_distro.stats()
    torch_distro.average(module)
    return {
        "checksums": checksums,
        "losses": losses,
        "mean": flat(module).cpu(),
        "mode": stats["modules"][0]["mode"],
        "exchanges": stats["exchanges"],
        "reference": torch.cat([w.flatten() for w in saved["reference"].values()]),
    }


@pytest.mark.parametrize("delay", ["0", "1"])
@pytest.mark.parametrize(
    ("devices", "dtype"),
    [
        (["cuda", "cuda"], torch.float32),
        (["cpu", "cuda"], torch.float32),
        (["cuda", "cpu"], torch.bfloat16),
    ],
)
def test_ranks_on_gpu_and_cpu_hold_one_reference(
    devices: list[str], dtype: torch.dtype, delay: str
) -> None:
    # One GPU for all: a group in which a rank trains on the CPU must not choose NCCL.
    results = run(2, _mixed, devices, dtype, env={"DISTRO_DELAY": delay, **_visible("0")})
    first = results[0]
    assert first["mode"] == "weights"
    assert first["exchanges"] == 9
    assert first["losses"][-1] < first["losses"][0]
    for other in results[1:]:
        assert other["checksums"] == first["checksums"]
        assert torch.equal(other["mean"], first["mean"])
        assert torch.equal(other["reference"], first["reference"])


def _trained(rank: int, size: int, kind: str, mode: str) -> torch.Tensor:
    device = _device(rank) if kind == "cuda" else torch.device("cpu")
    torch.manual_seed(0)
    module = DistributedDataParallel(Mixed().to(device))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    train(module, optimizer, [x.to(device) for x in batches(rank, 20)])
    if mode == "weights":
        torch_distro.average(module)
    return flat(module).cpu()


@pytest.mark.parametrize("mode", ["dense", "weights"])
@pytest.mark.parametrize(
    "visible", [pytest.param(None, marks=two_gpus, id="nccl"), pytest.param("0", id="staged")]
)
def test_ddp_trains_on_the_gpu_as_on_the_cpu(mode: str, visible: str | None) -> None:
    options = {"k": 4096, "value_bits": 32, "delay": 0} if mode == "weights" else None
    env = {"DISTRO_MODE": mode, **_visible(visible)}
    gpu = run(2, _trained, "cuda", mode, env=env, options=options)
    cpu = run(2, _trained, "cpu", mode, env=env, options=options)
    assert torch.equal(gpu[0], gpu[1])
    assert (gpu[0] - cpu[0]).abs().max() < 1e-3  # the kernels round differently


def _scaled(rank: int, size: int) -> dict[str, Any]:
    """Autocast and GradScaler; rank 1 overflows at one step and skips the optimizer's."""
    device = _device(rank)
    torch.manual_seed(0)
    module = DistributedDataParallel(Mixed().to(device))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cuda")
    for step, x in enumerate(batches(rank, 8)):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = module(x.to(device)).square().mean()
        scale = float("inf") if rank == 1 and step == 3 else 1.0
        scaler.scale(loss * scale).backward()
        scaler.step(optimizer)
        scaler.update()
    stats = torch_distro.stats()
    torch_distro.average(module)
    assert flat(module).isfinite().all()
    return {"checksum": stats["reference_checksum"], "mean": flat(module).cpu()}


def test_autocast_and_a_grad_scaler_that_skips_on_one_rank() -> None:
    first, second = run(2, _scaled, env=_visible("0"))
    assert first["checksum"] == second["checksum"]
    assert torch.equal(first["mean"], second["mean"])
