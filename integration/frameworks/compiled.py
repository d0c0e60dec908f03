"""A compiled DDP module.

torchrun --standalone --nproc-per-node=2 compiled.py --backend distro
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
from gpt import GPT, TEXT, cross_entropy, encode, windows
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("--inside", action="store_true", help="compile the module in the wrapper")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--save")
    args = parser.parse_args()

    dist.init_process_group(args.backend)
    rank = dist.get_rank()
    torch.manual_seed(0)
    codes, vocabulary = encode(TEXT)
    own = GPT(vocabulary)
    model: Any
    if args.inside:
        model = DistributedDataParallel(torch.compile(own, backend=args.compiler))
    else:
        model = torch.compile(DistributedDataParallel(own), backend=args.compiler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(rank)
    for step in range(args.steps):
        x, y = windows(codes, 8, 32, generator)
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.9g}")

    if args.save and rank == 0:
        torch.save(own.state_dict(), args.save)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
