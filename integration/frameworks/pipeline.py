"""Pipeline parallelism: the layers of one model over the ranks, GPipe's schedule.

torchrun --standalone --nproc-per-node=2 pipeline.py --backend distro
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

WIDTH = 48


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--save", help="the last stage, by the last rank")
    args = parser.parse_args()

    dist.init_process_group(args.backend)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    last = rank == ranks - 1
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(ranks - 1)]
    own: nn.Module = nn.Linear(WIDTH, WIDTH) if last else layers[rank]
    device = torch.device("cpu")
    stage = PipelineStage(own, rank, ranks, device, input_args=(torch.zeros(8, WIDTH),))
    schedule = ScheduleGPipe(stage, n_microbatches=4, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.Adam(own.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)  # all ranks draw the same data
    for step in range(args.steps):
        inputs = torch.randn(32, WIDTH, generator=generator)
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(inputs)
        elif last:
            schedule.step(target=inputs.roll(1, 1), losses=losses)
        else:
            schedule.step()
        optimizer.step()
        if last:
            print(f"step {step}: loss {torch.stack(losses).mean().item():.9g}")

    if args.save and last:
        torch.save(own.state_dict(), args.save)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
