"""Fully sharded training in the manner of pytorch/examples' FSDP2: no mesh, no groups.

torchrun --standalone --nproc-per-node=2 fsdp2_example.py --backend distro
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
from gpt import GPT, TEXT, cross_entropy, encode, windows
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def set_modules_to_forward_prefetch(model: torch.nn.Module, number: int) -> None:
    """Each layer gathers the next ones before it computes."""
    layers = list(model.blocks)  # type: ignore[arg-type]
    for i, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[i + 1 : i + 1 + number])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--mixed-precision", action="store_true")
    parser.add_argument("--save", help="the whole model, on rank 0")
    args = parser.parse_args()

    dist.init_process_group(args.backend)
    rank = dist.get_rank()
    torch.manual_seed(0)
    codes, vocabulary = encode(TEXT)
    with torch.device("meta"):
        model = GPT(vocabulary)
    fsdp_kwargs: dict[str, Any] = {}
    if args.mixed_precision:
        fsdp_kwargs["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    for layer in model.blocks:
        fully_shard(layer, **fsdp_kwargs)
    fully_shard(model, **fsdp_kwargs)
    assert isinstance(model, FSDPModule)
    model.to_empty(device="cpu")
    model.reset_parameters()
    set_modules_to_forward_prefetch(model, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    generator = torch.Generator().manual_seed(rank)
    for step in range(args.steps):
        x, y = windows(codes, 8, 32, generator)
        model.unshard()  # ahead of the forward
        loss = cross_entropy(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.9g}")

    if args.save:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        everything = get_model_state_dict(model, options=options)
        if rank == 0:
            torch.save(everything, args.save)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
