"""GPT training in the manner of nanoGPT.

Micro-batches are accumulated without synchronising until the last, gradients are clipped, a scaler
is there for fp16 and switched off elsewhere, and the loss is estimated on rank 0 at intervals.

torchrun --standalone --nproc-per-node=2 nanogpt.py --backend distro
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os

import torch
import torch.distributed as dist
from gpt import GPT, TEXT, cross_entropy, encode, windows
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

WARMUP = 2


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Linear warm-up, then half a cosine to a tenth."""
    if step < WARMUP:
        return highest * (step + 1) / (WARMUP + 1)
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return highest * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def estimate_loss(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    model.eval()
    losses = [cross_entropy(model(x), y).item() for x, y in batches]
    model.train()
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--max-iters", type=int, default=10)
    parser.add_argument("--eval-interval", type=int, default=5)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=4, help="of all ranks")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--grad-clip", type=float, default=1.0)
    parser.add_argument("--save")
    args = parser.parse_args()

    ddp = int(os.environ.get("RANK", -1)) != -1
    rank, ranks = 0, 1
    if ddp:
        dist.init_process_group(backend=args.backend)
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    master = rank == 0
    accumulate = args.gradient_accumulation_steps // ranks

    torch.manual_seed(1337)
    dtype = getattr(torch, args.dtype)
    autocast = (
        contextlib.nullcontext()
        if dtype == torch.float32
        else torch.amp.autocast(device_type=args.device, dtype=dtype)
    )
    codes, vocabulary = encode(TEXT)
    generator = torch.Generator().manual_seed(1337 + rank)
    held_out = [windows(codes[-5000:], 16, args.block_size, generator) for _ in range(2)]
    raw = GPT(vocabulary, args.block_size).to(args.device)
    decay = [p for p in raw.parameters() if p.dim() > 1]
    others = [p for p in raw.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler(args.device, enabled=dtype == torch.float16)
    model: nn.Module = DistributedDataParallel(raw) if ddp else raw

    for step in range(args.max_iters + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.max_iters, args.lr)
        if step % args.eval_interval == 0 and master:
            print(f"step {step}: val {estimate_loss(raw, held_out):.9g}")
        for micro in range(accumulate):
            if ddp:
                model.require_backward_grad_sync = micro == accumulate - 1
            x, y = windows(codes[:-5000], args.batch_size, args.block_size, generator)
            with autocast:
                loss = cross_entropy(model(x.to(args.device)), y.to(args.device)) / accumulate
            scaler.scale(loss).backward()
        if args.grad_clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if master:
            print(f"iter {step}: loss {loss.item() * accumulate:.9g}")

    if master and args.save:
        torch.save(raw.state_dict(), args.save)
    if ddp:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
