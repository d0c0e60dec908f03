"""GPT training in the manner of the minGPT example: a trainer class with snapshots.

A run that finds its snapshot goes on from it, as one that torchrun restarts does.

torchrun --standalone --nproc-per-node=2 mingpt.py --backend distro --save snapshot.pt
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from gpt import GPT, TEXT, cross_entropy, encode
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class Characters(Dataset[tuple[Tensor, Tensor]]):
    """Neighbouring stretches of a text."""

    def __init__(self, codes: Tensor, length: int) -> None:
        self.codes, self.length = codes, length

    def __len__(self) -> int:
        return (len(self.codes) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        begin = index * self.length
        piece = self.codes[begin : begin + self.length + 1]
        return piece[:-1], piece[1:]


@dataclass
class TrainerConfig:
    """What the trainer needs besides model and data."""

    max_epochs: int
    batch_size: int
    grad_norm_clip: float
    snapshot_path: str | None
    bf16: bool


class Trainer:
    """Trains, and saves what a restart needs after each epoch."""

    def __init__(
        self,
        config: TrainerConfig,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        data: Dataset[tuple[Tensor, Tensor]],
    ) -> None:
        self.config, self.optimizer = config, optimizer
        self.rank = int(os.environ["RANK"])
        self.sampler: DistributedSampler[tuple[Tensor, Tensor]] = DistributedSampler(data)
        self.loader = DataLoader(data, config.batch_size, sampler=self.sampler)
        self.first_epoch = 0
        self.raw = model
        if config.snapshot_path and os.path.exists(config.snapshot_path):
            snapshot = torch.load(config.snapshot_path)
            model.load_state_dict(snapshot["model_state"])
            optimizer.load_state_dict(snapshot["optimizer_state"])
            self.first_epoch = snapshot["finished_epoch"] + 1
            print(f"resuming from epoch {self.first_epoch}")
        self.model = DistributedDataParallel(model)

    def _run_batch(self, x: Tensor, y: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
            loss = cross_entropy(self.model(x), y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_norm_clip)
        self.optimizer.step()
        return loss.item()

    def train(self) -> None:
        for epoch in range(self.first_epoch, self.config.max_epochs):
            self.sampler.set_epoch(epoch)
            for i, (x, y) in enumerate(self.loader):
                loss = self._run_batch(x, y)
                if self.rank == 0:
                    print(f"epoch {epoch} | batch {i} | loss {loss:.9g}")
            if self.rank == 0 and self.config.snapshot_path:
                snapshot = {
                    "model_state": self.raw.state_dict(),
                    "optimizer_state": self.optimizer.state_dict(),
                    "finished_epoch": epoch,
                }
                torch.save(snapshot, self.config.snapshot_path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--save")
    args = parser.parse_args()

    dist.init_process_group(backend=args.backend)
    torch.manual_seed(0)
    codes, vocabulary = encode(TEXT)
    data = Characters(codes[:5121], 32)
    model = GPT(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    config = TrainerConfig(args.epochs, 16, 1.0, args.save, bf16=True)
    Trainer(config, model, optimizer, data).train()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
