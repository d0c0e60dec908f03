"""A training loop with Accelerate.

On CPUs Accelerate knows gloo and MPI only; it takes a group that is there already.

torchrun --standalone --nproc-per-node=2 accelerate_loop.py --backend distro
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--save")
    args = parser.parse_args()

    torch.distributed.init_process_group(args.backend)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 256), nn.GELU(), nn.Linear(256, 20))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    data = TensorDataset(torch.randn(384, 20, generator=torch.Generator().manual_seed(1)))
    loader = DataLoader(data, batch_size=16)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    for epoch in range(args.epochs):
        for i, (inputs,) in enumerate(loader):
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(inputs), inputs.roll(1, 1))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            accelerator.print(f"epoch {epoch} batch {i}: loss {loss.item():.9g}")
        mean = accelerator.gather_for_metrics(loss.detach()).mean()
        accelerator.print(f"epoch {epoch}: mean of the ranks {mean.item():.9g}")

    accelerator.wait_for_everyone()
    if args.save:
        accelerator.save(accelerator.unwrap_model(model).state_dict(), args.save)
    accelerator.end_training()


if __name__ == "__main__":
    main()
