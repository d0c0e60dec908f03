"""Image classification as the ImageNet example does it, on images that are made up here.

A residual network with batch norm, SGD with momentum, a validation of which all ranks do a part, a
checkpoint each epoch, and a resume from it.

torchrun --standalone --nproc-per-node=2 imagenet.py --dist-backend distro
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    """Images [batch, 3, height, width] -> logits [batch, classes]."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = BasicBlock(width, width, 1)
        self.layer2 = BasicBlock(width, 2 * width, 2)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean(dim=(2, 3)))


class FakeImages(Dataset[tuple[Tensor, Tensor]]):
    """Noisy copies of one random picture a class."""

    def __init__(self, size: int, classes: int, seed: int) -> None:
        pictures = torch.randn(classes, 3, 12, 12, generator=torch.Generator().manual_seed(7))
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(classes, (size,), generator=generator)
        noise = torch.randn(size, 3, 12, 12, generator=generator)
        self.images = pictures[self.labels] + noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


class Meter:
    """A sum and a count that the ranks can add up."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: float, count: int) -> None:
        self.total += value * count
        self.count += count

    def all_reduce(self) -> None:
        both = torch.tensor([self.total, self.count], dtype=torch.float64)
        dist.all_reduce(both, dist.ReduceOp.SUM, async_op=False)
        self.total, self.count = both[0].item(), int(both[1])

    @property
    def average(self) -> float:
        return self.total / max(self.count, 1)


def train(
    loader: DataLoader[tuple[Tensor, Tensor]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
) -> None:
    model.train()
    for i, (images, target) in enumerate(loader):
        loss = functional.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0:
            print(f"epoch {epoch} [{i}/{len(loader)}] loss {loss.item():.9g}")


def validate(loader: DataLoader[tuple[Tensor, Tensor]], model: nn.Module) -> float:
    """Accuracy over the images of all ranks, 0 to 1."""
    losses, top1 = Meter(), Meter()
    model.eval()
    with torch.no_grad():
        for images, target in loader:
            output = model(images)
            losses.update(functional.cross_entropy(output, target).item(), len(images))
            hits = (output.argmax(1) == target).double().mean().item()
            top1.update(hits, len(images))
    losses.all_reduce()
    top1.all_reduce()
    if dist.get_rank() == 0:
        print(f"validation: entropy {losses.average:.9g} top1 {top1.average:.4f}")
    return top1.average


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dist-backend", default="nccl")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--start-epoch", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16, help="of a rank")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--save", default="checkpoint.pt")
    parser.add_argument("--resume", action="store_true", help="from --save, if it is there")
    args = parser.parse_args()

    dist.init_process_group(backend=args.dist_backend)
    torch.manual_seed(0)
    classes = 5
    model = DistributedDataParallel(ResNet(classes))
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    scheduler = StepLR(optimizer, step_size=30, gamma=0.1)
    best = 0.0
    if args.resume and os.path.isfile(args.save):
        checkpoint = torch.load(args.save)
        args.start_epoch, best = checkpoint["epoch"], checkpoint["best"]
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])

    training, held_out = FakeImages(160, classes, seed=1), FakeImages(64, classes, seed=2)
    sampler: DistributedSampler[tuple[Tensor, Tensor]] = DistributedSampler(training)
    loader = DataLoader(training, args.batch_size, sampler=sampler)
    val_sampler: DistributedSampler[tuple[Tensor, Tensor]] = DistributedSampler(
        held_out, shuffle=False, drop_last=True
    )
    val_loader = DataLoader(held_out, args.batch_size, sampler=val_sampler)

    for epoch in range(args.start_epoch, args.epochs):
        sampler.set_epoch(epoch)
        train(loader, model, optimizer, epoch)
        best = max(best, validate(val_loader, model))
        scheduler.step()
        if dist.get_rank() == 0:
            state = {
                "epoch": epoch + 1,
                "best": best,
                "state_dict": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
            }
            torch.save(state, args.save)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
