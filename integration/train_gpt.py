"""Trains a small character GPT with DistributedDataParallel: one plain script for every backend.

Start it with torchrun, which sets RANK, WORLD_SIZE and the rest:

    torchrun --standalone --nproc-per-node=4 integration/train_gpt.py --backend distro

Nothing in the training knows which backend carries the gradients. `--backend none` makes no process
group at all: started by torchrun, each rank then trains alone on its own batches, which is the line
that any exchange between ranks has to beat.

With `--checkpoint FOLDER` a run that was killed goes on from its last checkpoint when it is started
again, by hand or by `torchrun --max-restarts`; each machine may have a folder of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before init: it keeps the default group of its import
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
    add(
        "--checkpoint", type=Path, metavar="FOLDER", help="go on from what is there, and save there"
    )
    add("--checkpoint-every", type=int, default=100, metavar="STEPS")
    add("--checkpoint-ranks", choices=("all", "first"), default="all", help="who saves")
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


@dataclass
class Training:
    """What a step changes; `model` is `own`, wrapped where several ranks train together."""

    model: nn.Module
    own: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    text: Text
    history: History = field(default_factory=History)


class Checkpoints:
    """A file for each rank and step, of which a run goes on.

    Ranks differ in more than their data: with distro each has moments of its own, and moves that it
    has not sent yet. Where rank 0 alone saves, these are lost.
    """

    def __init__(self, args: argparse.Namespace, training: Training, rank: int, ranks: int) -> None:
        self.folder, self.every, self.training = args.checkpoint, args.checkpoint_every, training
        self.rank, self.ranks, self.seed = rank, ranks, args.seed
        self.distro = args.backend == "distro"
        self.saves = rank == 0 or args.checkpoint_ranks == "all"

    def path(self, step: int) -> Path:
        return self.folder / f"rank{self.rank}.step{step}.pt"

    def steps(self) -> set[int]:
        """Those of which this rank has a whole file."""
        files = self.folder.glob(f"rank{self.rank}.step*.pt")
        return {int(path.stem.partition(".step")[2]) for path in files}

    def save(self, step: int) -> None:
        """At every so many steps. A rank may be killed anywhere in here."""
        if not self.folder or step % self.every:
            return
        if self.saves:
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = self.path(step).with_suffix(".unfinished")
            torch.save(self.state(), unfinished)
            os.replace(unfinished, self.path(step))
        if dist.is_initialized():
            dist.barrier()  # all have saved this step: those before are not needed any more
        for old in self.steps() - {step}:
            self.path(old).unlink()

    def state(self) -> dict[str, Any]:
        training = self.training
        return {
            "model": training.own.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "scheduler": training.scheduler.state_dict(),
            "generator": training.text.generator.get_state(),
            "history": asdict(training.history),
            "exchange": self.exchange_state(),
        }

    def exchange_state(self) -> dict[str, Any] | None:
        """What this rank has moved and not sent; nothing where all gradients are exact."""
        if not self.distro:
            return None
        import torch_distro

        if all(module["mode"] == "exact" for module in torch_distro.stats()["modules"]):
            return None
        return torch_distro.state_dict(self.training.model)

    def resume(self) -> int:
        """Take up the newest step that all ranks have saved, or else rank 0; 0 if there is none."""
        if not self.folder:
            return 0
        everyone: list[Any] = [self.steps()]
        if dist.is_initialized():
            everyone = [None] * self.ranks
            dist.all_gather_object(everyone, self.steps())
        common = set.intersection(*everyone)
        step = max(common or everyone[0], default=0)
        if step == 0:
            return 0
        state: list[Any] = [None]
        if common or self.rank == 0:
            state = [torch.load(self.path(step), map_location=self.training.text.device)]
        if not common:
            dist.broadcast_object_list(state, device=self.training.text.device)
            state[0]["exchange"] = None  # rank 0's own
        self.take(state[0])
        if not common and self.rank != 0:
            self.training.text.generator.manual_seed(1000 * (self.seed + step) + self.rank)
        if self.rank == 0:
            print(f"goes on from step {step}, saved by {'all ranks' if common else 'rank 0'}")
        return step

    def take(self, state: dict[str, Any]) -> None:
        training = self.training
        training.own.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.scheduler.load_state_dict(state["scheduler"])
        training.text.generator.set_state(state["generator"].cpu())
        training.history = History(**state["history"])
        if state["exchange"] is not None:
            import torch_distro

            torch_distro.load_state_dict(training.model, state["exchange"])


def train(
    args: argparse.Namespace, training: Training, rank: int, checkpoints: Checkpoints
) -> None:
    """The training loop."""
    model, own, optimizer = training.model, training.own, training.optimizer
    done = checkpoints.resume()
    history = training.history
    progress = tqdm(
        range(done + 1, args.steps + 1),
        disable=rank != 0,
        desc=args.name,
        initial=done,
        total=args.steps,
    )
    for step in progress:
        begin = time.perf_counter()
        loss = model(*training.text.batch(args.batch))
        loss.backward()
        if args.clip > 0:
            nn.utils.clip_grad_norm_(own.parameters(), args.clip)
        optimizer.step()
        training.scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        history.train.append(loss.item())
        history.seconds.append(time.perf_counter() - begin)
        if rank == 0 and step % args.eval_every == 0 and step < args.steps:
            history.validation.append((step, evaluate(own, training.text.validation)))
            losses = {"train": loss.item(), "val": history.validation[-1][1]}
            progress.set_postfix(losses, refresh=False)
        checkpoints.save(step)


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
    optimizer = adamw(own, args.lr, args.weight_decay)
    scheduler = LambdaLR(optimizer, lambda step: share_of_lr(step, args.warmup, args.steps))
    training = Training(model, own, optimizer, scheduler, text)
    train(args, training, rank, Checkpoints(args, training, rank, ranks))
    history = training.history

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
        # The group's threads end with its last reference. One of gloo's that still frees a tensor
        # of Python's while the interpreter ends would abort the process.
        del model, training
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
