"""Trains a small character GPT with DistributedDataParallel: one plain script for every backend.

Start it with torchrun, which sets RANK, WORLD_SIZE and the rest:

    torchrun --standalone --nproc-per-node=4 integration/train_gpt.py --backend distro

Nothing in the training knows which backend carries the gradients. `--backend none` makes no process
group at all: started by torchrun, each rank then trains alone on its own batches, which is the line
that any exchange between ranks has to beat.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

DATA = Path(__file__).parent / "data" / "tinyshakespeare.txt"


def arguments() -> argparse.Namespace:
    """The command line; the defaults are the quick start's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--backend", choices=("gloo", "distro", "none"), default="none")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--data", type=Path, default=DATA, help="a text file; its last tenth is for validation")
    add("--out", type=Path, help="where rank 0 writes the run's JSON (ranks alone: one file each)")
    add("--steps", type=int, default=600)
    add("--batch", type=int, default=8, help="sequences a rank and step")
    add("--block", type=int, default=64, help="characters in a sequence")
    add("--layers", type=int, default=2)
    add("--heads", type=int, default=6)
    add("--width", type=int, default=192)
    add("--lr", type=float, default=3e-3)
    add("--warmup", type=int, default=50, help="steps until the learning rate is reached")
    add("--weight-decay", type=float, default=0.1)
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0 for no clipping")
    add("--eval-every", type=int, default=100)
    add("--eval-windows", type=int, default=256, help="sequences of the validation set")
    add("--seed", type=int, default=1)
    add("--timeout-seconds", type=float, help="of the process group; default: torch's")
    add("--name", default="training", help="what the progress bar calls this run")
    return parser.parse_args()


class Block(nn.Module):
    """One transformer layer: attention over the past, then a feed-forward, both residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.norm_feed = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.grow = nn.Linear(width, 4 * width, bias=False)
        self.shrink = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x))
        q, k, v = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.shrink(functional.gelu(self.grow(self.norm_feed(x))))


class GPT(nn.Module):
    """Characters [batch, length] and the characters after them -> mean cross-entropy in nats."""

    def __init__(self, vocabulary: int, block: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(block, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                residual = name.endswith(("mix.weight", "shrink.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        places = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.characters(inputs) + self.places(places)
        logits = self.head(self.norm(self.blocks(x)))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


Batch = tuple[Tensor, Tensor]


class Text:
    """A text as numbers: random training batches of a rank's own, one validation set for all."""

    def __init__(self, args: argparse.Namespace, device: torch.device, seed: int) -> None:
        text = args.data.read_text(encoding="utf-8")
        alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
        codes = torch.tensor([alphabet[character] for character in text])
        self.vocabulary, self.block, self.device = len(alphabet), args.block, device
        self.training, held_out = codes[: len(codes) * 9 // 10], codes[len(codes) * 9 // 10 :]
        self.generator = torch.Generator().manual_seed(seed)
        starts = torch.linspace(0, len(held_out) - args.block - 1, args.eval_windows).long()
        self.validation = [self.windows(held_out, some) for some in starts.split(32)]

    def windows(self, codes: Tensor, starts: Tensor) -> Batch:
        rows = codes[starts[:, None] + torch.arange(self.block + 1)].to(self.device)
        return rows[:, :-1], rows[:, 1:]

    def batch(self, size: int) -> Batch:
        starts = torch.randint(len(self.training) - self.block, (size,), generator=self.generator)
        return self.windows(self.training, starts)


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Batch]) -> float:
    """Mean loss over all sequences, by this rank's own weights."""
    model.eval()
    total = sum(model(*batch).item() * len(batch[0]) for batch in batches)
    model.train()
    return total / sum(len(inputs) for inputs, _ in batches)


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices, and not the gains of the norms."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)


def share_of_lr(step: int, warmup: int, steps: int) -> float:
    """A linear rise during the warm-up, then half a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


@dataclass
class History:
    """What one rank saw in training; validation losses, (step, loss), on rank 0 only."""

    train: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def train(
    args: argparse.Namespace, model: nn.Module, own: nn.Module, text: Text, rank: int
) -> History:
    """The training loop; `model` is `own`, wrapped where several ranks train together."""
    optimizer = adamw(own, args.lr, args.weight_decay)
    scheduler = LambdaLR(optimizer, lambda step: share_of_lr(step, args.warmup, args.steps))
    history = History()
    progress = tqdm(range(1, args.steps + 1), disable=rank != 0, desc=args.name)
    for step in progress:
        begin = time.perf_counter()
        loss = model(*text.batch(args.batch))
        loss.backward()
        if args.clip > 0:
            nn.utils.clip_grad_norm_(own.parameters(), args.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        history.train.append(loss.item())
        history.seconds.append(time.perf_counter() - begin)
        if rank == 0 and step % args.eval_every == 0 and step < args.steps:
            history.validation.append((step, evaluate(own, text.validation)))
            losses = {"train": loss.item(), "val": history.validation[-1][1]}
            progress.set_postfix(losses, refresh=False)
    return history


def counters(args: argparse.Namespace, own: nn.Module) -> dict[str, Any]:
    """What this rank reduced and sent in training: counted by distro, elsewhere by arithmetic."""
    if args.backend == "distro":
        import torch_distro

        return dict(torch_distro.stats())
    bytes_a_step = sum(p.numel() * p.element_size() for p in own.parameters())
    sent = 0 if args.backend == "none" else None  # gloo doesn't count its bytes
    return {
        "gradient_bytes": bytes_a_step * args.steps,
        "payload_bytes_sent": sent,
        "socket_bytes_sent": sent,
    }


def main() -> None:
    args = arguments()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    together = args.backend != "none"
    if together:
        seconds = args.timeout_seconds
        timeout = None if seconds is None else datetime.timedelta(seconds=seconds)
        dist.init_process_group(args.backend, timeout=timeout)

    torch.manual_seed(args.seed)  # the same first weights on all ranks
    text = Text(args, device, seed=1000 * args.seed + rank)
    own = GPT(text.vocabulary, args.block, args.layers, args.heads, args.width).to(device)
    model = DistributedDataParallel(own) if together else own
    history = train(args, model, own, text, rank)

    writes = rank == 0 or not together
    val_loss = evaluate(own, text.validation) if writes else math.nan
    history.validation.append((args.steps, val_loss))
    if args.backend == "distro":
        import torch_distro

        torch_distro.average(model)  # the last act: what is still unsent reaches all ranks
    mine = counters(args, own) | {
        "rank": rank,
        "train_loss": statistics.fmean(history.train[-50:]),
        "step_seconds_median": statistics.median(history.seconds),
    }
    everyone: list[Any] = [mine]
    if together:
        everyone = [None] * ranks
        dist.all_gather_object(everyone, mine)
    val_loss_average = evaluate(own, text.validation) if writes and together else None
    if together:
        # Gloo's threads outlive the group, and one that still frees a tensor of Python's while the
        # interpreter ends aborts the process. All wait here for rank 0, by a barrier: it has none.
        dist.barrier()
        dist.destroy_process_group()
    if args.out and writes:
        result = {
            "backend": args.backend,
            "ranks": ranks,
            "steps": args.steps,
            "parameters": sum(p.numel() for p in own.parameters()),
            "val_loss": val_loss,
            "val_loss_average": val_loss_average,
            "per_rank": everyone,
            "history": {"train": history.train, "validation": history.validation},
            "arguments": {name: str(value) for name, value in vars(args).items()},
        }
        path = args.out if rank == 0 else args.out.with_suffix(f".rank{rank}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
