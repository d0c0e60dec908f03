"""Fully sharded training in the manner of torchtitan, by FSDP2.

Each block is sharded by itself, computes in bf16 and reduces in fp32; the norm of the gradients is
a DTensor's; checkpoints are torch.distributed.checkpoint's. A run that finds its checkpoint goes on
from it.

torchrun --standalone --nproc-per-node=2 fsdp2.py --backend distro
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gpt import GPT, TEXT, cross_entropy, encode, windows
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


class AppState(Stateful):
    """Model and optimizer, as the checkpoint sees them."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.step = model, optimizer, 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.step = state["step"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=1, help="above 1: hybrid sharding")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--save", help="the whole model, on rank 0")
    args = parser.parse_args()

    dist.init_process_group(args.backend)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if args.replicas > 1:
        shape, names = (args.replicas, ranks // args.replicas), ("replicate", "shard")
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    else:
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))

    torch.manual_seed(0)
    codes, vocabulary = encode(TEXT)
    model = GPT(vocabulary)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))

    state = AppState(model, optimizer)
    if args.checkpoint and args.checkpoint.exists():
        dcp.load({"app": state}, checkpoint_id=args.checkpoint)
    generator = torch.Generator().manual_seed(1000 * state.step + rank)
    for step in range(state.step, args.steps):
        x, y = windows(codes, 8, 32, generator)
        loss = cross_entropy(model(x), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: loss {mean.item():.9g} grad_norm {whole.item():.9g}")

    state.step = args.steps
    if args.checkpoint:
        dcp.save({"app": state}, checkpoint_id=args.checkpoint)
    if args.save:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        everything = get_model_state_dict(model, options=options)
        if rank == 0:
            torch.save(everything, args.save)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
