"""Small modules and trainings for the tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Mixed(nn.Module):
    """Every kind of parameter: large, partial tiles, 1-D, 0-d, tied, frozen, optionally unused."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(20, 250)
        self.second = nn.Linear(250, 20)
        self.norm = nn.LayerNorm(20)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.tied = nn.Linear(20, 20, bias=False)
        self.tied_again = nn.Linear(20, 20, bias=False)
        self.tied_again.weight = self.tied.weight
        self.frozen = nn.Linear(20, 20)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(30, 7) if unused else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.second(torch.tanh(self.first(x)))) * self.scale
        return self.frozen(self.tied_again(torch.tanh(self.tied(x))))


class Buffered(nn.Module):
    """A module whose buffers DDP broadcasts at every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 300), nn.BatchNorm1d(300), nn.Linear(300, 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def batches(rank: int, steps: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + rank)
    return [torch.randn(16, 20, generator=generator).to(dtype) for _ in range(steps)]


def train(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[torch.Tensor],
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Losses of a regression to a shifted input; one optimizer step a batch."""
    losses = []
    for step, x in enumerate(data):
        loss = (module(x) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if after_step:
            after_step(step)
    return losses


_seeding = threading.Lock()  # the seed is the process's; ranks may be threads


def wrapped(seed: int = 0, **options: Any) -> DistributedDataParallel:  # noqa: ANN401 - DDP's own
    with _seeding:
        torch.manual_seed(seed)
        model = Mixed(unused=bool(options.get("find_unused_parameters")))
    return DistributedDataParallel(model, **options)


def flat(module: nn.Module) -> torch.Tensor:
    """All trainable weights, as fp64 on one line."""
    return torch.cat(
        [p.detach().double().flatten() for p in module.parameters() if p.requires_grad]
    )


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of most tests."""
    # The default eps is zero in fp16.
    return torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-4)
