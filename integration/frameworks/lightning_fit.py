"""A LightningModule, fitted with DDP; the backend's name is an argument of the strategy.

torchrun --standalone --nproc-per-node=2 lightning_fit.py --backend distro
"""

from __future__ import annotations

import argparse

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Regression(lightning.LightningModule):
    """A small network that learns to turn its input by one place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 256), nn.BatchNorm1d(256), nn.Linear(256, 20))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = nn.functional.mse_loss(self.layers(batch[0]), batch[0].roll(1, 1))
        self.log("train_loss", loss, sync_dist=True)
        self.print(f"step {self.global_step}: loss {loss.item():.9g}")
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        loss = nn.functional.mse_loss(self.layers(batch[0]), batch[0].roll(1, 1))
        self.log("val_loss", loss, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def loader(seed: int, size: int) -> DataLoader[tuple[Tensor, ...]]:
    data = torch.randn(size, 20, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(data), batch_size=16)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--save")
    args = parser.parse_args()

    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend=args.backend),
        max_epochs=args.epochs,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Regression()
    trainer.fit(model, loader(1, 192), loader(2, 64))
    trainer.validate(model, loader(2, 64), verbose=False)
    if args.save:
        trainer.save_checkpoint(args.save)


if __name__ == "__main__":
    main()
