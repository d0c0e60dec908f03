"""Tensor and sequence parallelism: one model over all ranks.

torchrun --standalone --nproc-per-node=2 tensor_parallel.py --backend distro
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from gpt import GPT, TEXT, cross_entropy, encode, windows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--save")
    args = parser.parse_args()

    dist.init_process_group(args.backend)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    codes, vocabulary = encode(TEXT)
    model = GPT(vocabulary)
    parallelize_module(
        model,
        mesh,
        {
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        },
    )
    scatter = PrepareModuleInput(
        input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
    )
    gather = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    parallelize_module(model.blocks[0], mesh, scatter)
    for block in model.blocks:
        parallelize_module(
            block,
            mesh,
            {
                "norm1": SequenceParallel(),
                "attention": gather,
                "attention.q": ColwiseParallel(),
                "attention.k": ColwiseParallel(),
                "attention.v": ColwiseParallel(),
                "attention.out": RowwiseParallel(output_layouts=Shard(1)),
                "norm2": SequenceParallel(),
                "feed_forward": gather,
                "feed_forward.up": ColwiseParallel(),
                "feed_forward.down": RowwiseParallel(output_layouts=Shard(1)),
            },
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)  # all ranks see the same data
    for step in range(args.steps):
        x, y = windows(codes, 8, 32, generator)
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.9g}")

    if args.save:
        everything = {
            name: weight.full_tensor() if isinstance(weight, DTensor) else weight
            for name, weight in model.state_dict().items()
        }
        if rank == 0:
            torch.save(everything, args.save)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
