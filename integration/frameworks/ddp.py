"""Distributed data parallel in its smallest form, as torch's own tutorial teaches it.

torchrun --standalone --nproc-per-node=2 ddp.py --backend distro
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class ToyModel(nn.Module):
    """Ten numbers in, five out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 512), nn.ReLU(), nn.Linear(512, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", help="torch's default if not given")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save")
    args = parser.parse_args()

    dist.init_process_group(args.backend)
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(ToyModel())
    target = torch.randn(10, 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(rank)

    for step in range(args.steps):
        inputs = torch.randn(32, 10, generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), inputs @ target)
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.9g}")

    if args.save and rank == 0:
        torch.save(model.module.state_dict(), args.save)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
