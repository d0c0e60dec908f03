"""A DDP training that is saved by torch.distributed.checkpoint half-way and resumed from there.

torchrun --standalone --nproc-per-node=2 checkpoint.py --backend distro --checkpoint folder
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(20, 256), nn.GELU(), nn.Linear(256, 20))
    )
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, target: torch.Tensor
) -> None:
    rank = dist.get_rank()
    for step in steps:
        inputs = torch.randn(32, 20, generator=torch.Generator().manual_seed(100 * step + rank))
        loss = nn.functional.mse_loss(model(inputs), inputs @ target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.9g}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--save")
    args = parser.parse_args()

    dist.init_process_group(args.backend)
    torch.manual_seed(0)
    target = torch.randn(20, 20)
    half = args.steps // 2

    model, optimizer = build()
    train(model, optimizer, range(half), target)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=args.checkpoint)

    model, optimizer = build()  # other weights than those saved
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=args.checkpoint)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    train(model, optimizer, range(half, args.steps), target)

    if args.save and dist.get_rank() == 0:
        torch.save(model.state_dict(), args.save)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
