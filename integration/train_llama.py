"""Trains a small Llama on characters by hybrid sharding (HSDP), in the manner of torchtitan.

RMSNorm, rotary attention, SwiGLU; each block is compiled and sharded by itself, then the root, over
a mesh of two dimensions; gradients are clipped by their total norm.

    torchrun --standalone --nproc-per-node=4 integration/train_llama.py --backend distro

Nothing here knows which backend carries the gradients.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

DATA = Path(__file__).parent / "data" / "tinyshakespeare.txt"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--backend", default="gloo")
    add("--fsdp", type=int, choices=(1, 2), default=2)
    add("--replicas", type=int, default=2, help="the other ranks of each hold its shards")
    add("--first-rank", type=int, default=0, help="a rank's data is that of its rank plus this")
    add("--compile", metavar="COMPILER", help="inductor, or another one; not compiled if missing")
    add("--bf16", action="store_true", help="compute in bfloat16, reduce in fp32")
    add("--tied", action="store_true", help="the head's weights are the embedding's")
    add("--steps", type=int, default=500)
    add("--batch", type=int, default=4, help="sequences a rank and step")
    add("--length", type=int, default=64, help="characters in a sequence")
    add("--layers", type=int, default=2)
    add("--heads", type=int, default=8)
    add("--width", type=int, default=256)
    add("--lr", type=float, default=3e-3)
    add("--warmup", type=int, default=50, help="steps until the learning rate is reached")
    add("--clip", type=float, default=1.0, help="largest norm of the gradients")
    add("--eval-windows", type=int, default=128, help="sequences of the validation set")
    add("--seed", type=int, default=1)
    add("--out", type=Path, help="where rank 0 writes losses as JSON")
    return parser.parse_args()


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary position embedding of [batch, heads, length, head]."""
    even, odd = x.chunk(2, dim=-1)
    cos, sin = turns.cos().to(x.dtype), turns.sin().to(x.dtype)
    return torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)


class Block(nn.Module):
    """One layer: attention over the past, then SwiGLU, both residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head = width // heads
        hidden = 32 * math.ceil(8 * width / 3 / 32)
        self.norm_attention = nn.RMSNorm(width)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm_feed = nn.RMSNorm(width)
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        batch, length, _ = x.shape
        y = self.norm_attention(x)
        q, k, v = (
            project(y).view(batch, length, -1, self.head).transpose(1, 2)
            for project in (self.wq, self.wk, self.wv)
        )
        q, k = rotate(q, turns), rotate(k, turns)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(seen.transpose(1, 2).reshape(batch, length, -1))
        y = self.norm_feed(x)
        return x + self.w2(functional.silu(self.w1(y)) * self.w3(y))


class Llama(nn.Module):
    """Characters [batch, length] -> logits [batch, length, vocabulary]."""

    def __init__(self, vocabulary: int, layers: int, heads: int, width: int, tied: bool) -> None:
        super().__init__()
        self.head = width // heads
        self.tok_embeddings = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleDict({str(i): Block(width, heads) for i in range(layers)})
        self.norm = nn.RMSNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                residual = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
        if tied:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        speeds = 10_000.0 ** -(torch.arange(0, self.head, 2, device=tokens.device) / self.head)
        turns = places[:, None] * speeds
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x, turns)
        return self.output(self.norm(x))


def shard(model: Llama, mesh: DeviceMesh, args: argparse.Namespace) -> nn.Module:
    """The model, sharded by FSDP2 or FSDP1."""
    if args.compile:
        for layer in model.layers.values():
            layer.compile(backend=args.compile, fullgraph=True)
    if args.fsdp == 2:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if args.bf16 else None, reduce_dtype=torch.float32
        )
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return model
    half = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallel(
        model,
        device_mesh=mesh,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        auto_wrap_policy=functools.partial(
            transformer_auto_wrap_policy, transformer_layer_cls={Block}
        ),
        mixed_precision=half if args.bf16 else None,
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )


class Text:
    """A text as numbers: random training batches of a rank's own, one validation set for all."""

    def __init__(self, length: int, windows: int, seed: int) -> None:
        text = DATA.read_text(encoding="utf-8")
        alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
        codes = torch.tensor([alphabet[character] for character in text])
        self.vocabulary, self.length = len(alphabet), length
        self.training, held_out = codes[: len(codes) * 9 // 10], codes[len(codes) * 9 // 10 :]
        self.generator = torch.Generator().manual_seed(seed)
        starts = torch.linspace(0, len(held_out) - length - 1, windows).long()
        self.validation = [self.rows(held_out, some) for some in starts.split(32)]

    def rows(self, codes: Tensor, starts: Tensor) -> Tensor:
        return codes[starts[:, None] + torch.arange(self.length + 1)]

    def batch(self, size: int) -> Tensor:
        starts = torch.randint(len(self.training) - self.length, (size,), generator=self.generator)
        return self.rows(self.training, starts)


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    logits = model(rows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, text: Text) -> float:
    """Mean loss of the validation set, by this replica's weights."""
    model.eval()
    losses = [loss_of(model, rows).item() for rows in text.validation]
    model.train()
    return statistics.fmean(losses)


@torch.no_grad()
def average(model: nn.Module, replicas: dist.ProcessGroup) -> None:
    """The mean of the replicas' weights, which is what they are unless something is compressed."""

    def mean(part: Tensor) -> None:
        dist.all_reduce(part, group=replicas)
        part.div_(dist.get_world_size(replicas))

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            for weight in model.parameters():
                mean(weight)
        return
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    for weight in model.parameters():
        assert isinstance(weight, DTensor)
        mean(weight.to_local())


def clip(model: nn.Module, most: float) -> float:
    """Clip by the norm of the whole gradient, and return it."""
    if isinstance(model, FullyShardedDataParallel):
        return model.clip_grad_norm_(most).item()
    norm = nn.utils.clip_grad_norm_(model.parameters(), most)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def share_of_lr(step: int, warmup: int, steps: int) -> float:
    """A linear rise during the warm-up, then half a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def main() -> None:
    args = arguments()
    dist.init_process_group(args.backend)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shape = (args.replicas, ranks // args.replicas)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "dp_shard"))

    torch.manual_seed(args.seed)
    text = Text(args.length, args.eval_windows, 1000 * args.seed + args.first_rank + rank)
    own = Llama(text.vocabulary, args.layers, args.heads, args.width, args.tied)
    count = sum(p.numel() for p in own.parameters())
    model = shard(own, mesh, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    scheduler = LambdaLR(optimizer, lambda step: share_of_lr(step, args.warmup, args.steps))
    losses, seconds = [], []
    for step in range(args.steps):
        begin = time.perf_counter()
        loss = loss_of(model, text.batch(args.batch))
        loss.backward()
        norm = clip(model, args.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
        if rank == 0 and (step % 100 == 0 or step == args.steps - 1):
            print(f"step {step}: loss {losses[-1]:.4f} grad_norm {norm:.4f}", flush=True)

    mine: dict[str, Any] = {
        "train_loss": statistics.fmean(losses[-50:]),
        "val_loss": evaluate(model, text),
        "step_seconds_median": statistics.median(seconds),
    }
    average(model, mesh.get_group("dp_replicate"))
    mine["val_loss_average"] = evaluate(model, text)
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, mine)
    if rank == 0:
        print(f"validation: loss {mine['val_loss']:.4f}")
        result = {"parameters": count, "steps": args.steps, "losses": losses, "per_rank": everyone}
        if args.out:
            args.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
