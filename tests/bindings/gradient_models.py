"""What the tests of modes ef and demo share: models, data, and trainings beside gloo's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch_distro
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

DENSE = {"mode": "ef", "k": 4096, "value_bits": 32}
"""Everything is sent, exactly: the mean gradient to rounding."""


class Net(nn.Module):
    """A layer of 5000 weights, one of 5000, and one that may be unused or checkpointed."""

    def __init__(self, uses_all: bool = True, reentrant: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(20, 250)
        self.second = nn.Linear(250, 20)
        self.other = nn.Linear(20, 20)
        self.uses_all, self.reentrant = uses_all, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        if self.reentrant:
            result = checkpoint(self.second, hidden, use_reentrant=True)
        else:
            result = self.second(hidden)
        return result + self.other(x) if self.uses_all else result


def model(dtype: torch.dtype = torch.float32, **options: bool) -> Net:
    torch.manual_seed(0)
    return Net(**options).to(dtype)


def data(rank: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(16, 20, generator=generator).to(dtype)


def backward(module: nn.Module, x: torch.Tensor) -> None:
    (module(x) - x.roll(1, 1)).square().mean().backward()


def gradients(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in module.parameters() if p.grad is not None])


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


Training = Callable[[DistributedDataParallel, int], None]


def beside_gloo(
    rank: int,
    training: Training,
    dtype: torch.dtype = torch.float32,
    model_options: dict[str, bool] | None = None,
    **options: Any,  # noqa: ANN401 - DDP's own
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights after the same training by distro and by gloo."""
    outcomes = []
    for group in (dist.group.WORLD, dist.new_group(backend="gloo")):
        module = DistributedDataParallel(
            model(dtype, **(model_options or {})), process_group=group, **options
        )
        training(module, rank)
        outcomes.append(weights(module))
    return outcomes[0], outcomes[1]


def steps(module: nn.Module, rank: int, count: int = 3) -> None:
    """Plain SGD."""
    dtype = next(module.parameters()).dtype
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(count):
        optimizer.zero_grad()
        backward(module, data(rank, step, dtype))
        optimizer.step()


@contextmanager
def reductions(count: int | None, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """So many reductions are compressed inside; None: at least one."""
    before = torch_distro.stats(group)["reductions"]
    yield
    made = torch_distro.stats(group)["reductions"] - before
    assert made > 0 if count is None else made == count, f"{made} reductions were compressed"


def same_everywhere(tensor: torch.Tensor) -> bool:
    """Whether all ranks have the same bits."""
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return all(torch.equal(gathered[0], other) for other in gathered)
