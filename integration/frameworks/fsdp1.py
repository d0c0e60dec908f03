"""Fully sharded training by FSDP1, FullyShardedDataParallel.

torchrun --standalone --nproc-per-node=2 fsdp1.py --backend distro
"""

from __future__ import annotations

import argparse
import functools

import torch
import torch.distributed as dist
from gpt import GPT, TEXT, Block, cross_entropy, encode, windows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardingStrategy,
)
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--strategy", default="FULL_SHARD", help="a ShardingStrategy")
    parser.add_argument("--replicas", type=int, default=1, help="above 1: of hybrid sharding")
    parser.add_argument("--save")
    args = parser.parse_args()

    dist.init_process_group(args.backend)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = None
    if args.replicas > 1:
        shape, names = (args.replicas, ranks // args.replicas), ("replicate", "shard")
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    torch.manual_seed(0)
    codes, vocabulary = encode(TEXT)
    model = FullyShardedDataParallel(
        GPT(vocabulary),
        sharding_strategy=ShardingStrategy[args.strategy],
        auto_wrap_policy=functools.partial(
            transformer_auto_wrap_policy, transformer_layer_cls={Block}
        ),
        device_id=torch.device("cpu"),
        device_mesh=mesh,
        use_orig_params=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(rank)
    for step in range(args.steps):
        x, y = windows(codes, 8, 32, generator)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        model.clip_grad_norm_(1.0)
        optimizer.step()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.9g}")

    if args.save:
        # Not by FULL_STATE_DICT: on CPUs it crashes torch 2.11, with any backend.
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            everything = {name: p.detach().clone() for name, p in model.named_parameters()}
        if rank == 0:
            torch.save(everything, args.save)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
