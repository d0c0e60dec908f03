"""Sites: two of two ranks, beside gloo, four ranks without sites, and two with twice the batch.

    python integration/bench_sites.py

First the same training four times: bytes, losses, whether the ranks of a site hold the same weights
after every step, and the reference everywhere. Then step times, interleaved in one run, so that
whatever else the machine does hits all alike. Prints JSON. All on this machine's loopback.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch_distro
from spawn import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from train_gpt import DATA, GPT, Batch, Text, evaluate

RANKS = 4
LEADERS = (0, 2)
# What is compared: all ranks by gloo; all as two sites; leaders only, each with the batches of its
# site; all without sites.
SETTINGS = ("gloo", "sites", "twice the batch", "ranks")


def group_of(setting: str, rank: int) -> Any:  # noqa: ANN401 - torch's own
    """The process group of a setting. Collective over all ranks."""
    if setting == "gloo":
        return dist.new_group(backend="gloo")
    if setting == "twice the batch":
        return dist.new_group(list(LEADERS), backend="distro")
    house = ("berlin", "lyon")[rank // 2] if setting == "sites" else None
    return dist.new_group(backend="distro", pg_options=torch_distro.Options(site=house))


class Training:
    """One setting's model and optimizer on one rank."""

    def __init__(self, args: argparse.Namespace, vocabulary: int, setting: str, rank: int) -> None:
        self.setting, self.rank = setting, rank
        self.group = group_of(setting, rank)
        torch.manual_seed(0)
        self.own = GPT(vocabulary, args.block, args.layers, args.heads, args.width)
        self.model: nn.Module | None = None
        if setting != "twice the batch" or rank in LEADERS:
            self.model = DistributedDataParallel(self.own, process_group=self.group)
        self.optimizer = torch.optim.AdamW(self.own.parameters(), lr=args.lr)

    def step(self, batches: list[Batch]) -> None:
        """One step on this rank's batch; `batches`: of all ranks."""
        if self.model is None:
            return
        house = [self.rank, self.rank + 1] if self.setting == "twice the batch" else [self.rank]
        inputs, targets = (
            torch.cat(part) for part in zip(*(batches[r] for r in house), strict=True)
        )
        self.model(inputs, targets).backward()
        nn.utils.clip_grad_norm_(self.own.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.own.parameters()])


def batches_of(text: Text, step: int, size: int) -> list[Batch]:
    """Of all ranks, the same on every one."""
    text.generator.manual_seed(step)
    return [text.batch(size) for _ in range(RANKS)]


def trained(training: Training, text: Text, args: argparse.Namespace) -> dict[str, Any]:
    """Losses, bytes and equality of one setting's training, as this rank saw them."""
    equal = True
    for step in range(args.steps):
        training.step(batches_of(text, step, args.batch))
        if training.setting == "sites":
            mine = training.weights()
            others = [torch.empty_like(mine) for _ in range(RANKS)]
            dist.all_gather(others, mine)
            equal = equal and torch.equal(others[training.rank // 2 * 2], mine)
    if training.model is None:
        return {}
    result = {"val_loss": evaluate(training.own, text.validation)}
    if training.setting != "gloo":
        stats = torch_distro.stats(training.group)
        result |= {
            name: stats[name]
            for name in ("participants", "payload_bytes_sent", "payload_bytes_received",
                         "site_bytes", "socket_bytes_sent", "reference_checksum")
        }  # fmt: skip
    if training.setting == "sites":
        result["equal_to_leader_after_every_step"] = equal
    torch_distro.average(training.model)
    return result | {"val_loss_average": evaluate(training.own, text.validation)}


def timed(trainings: list[Training], text: Text, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step by setting."""
    seconds: dict[str, list[float]] = {training.setting: [] for training in trainings}
    for turn in range(args.turns + 1):
        for training in trainings:
            dist.barrier()
            for step in range(5):
                batches = batches_of(text, step, args.batch)
                begin = time.perf_counter()
                training.step(batches)
                if turn > 0:  # the first turn warms up
                    seconds[training.setting].append(time.perf_counter() - begin)
    return seconds


def bench(rank: int, ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    dist.init_process_group("gloo")
    text = Text(args, torch.device("cpu"), seed=0)
    trainings = [Training(args, text.vocabulary, setting, rank) for setting in SETTINGS]
    runs = {training.setting: trained(training, text, args) for training in trainings}
    # Of the timing two ranks of four processes would say nothing.
    compared = [training for training in trainings if training.setting != "twice the batch"]
    return {"runs": runs, "seconds": timed(compared, text, args)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for name, default in (
        ("steps", 300), ("turns", 10), ("batch", 8), ("block", 64), ("layers", 2), ("heads", 6),
        ("width", 96), ("eval-windows", 128),
    ):  # fmt: skip
        add(f"--{name}", type=int, default=default)
    add("--lr", type=float, default=3e-3)
    add("--data", type=Path, default=DATA)
    args = parser.parse_args()
    results = run_ranks(RANKS, bench, args)
    medians = {
        setting: statistics.median(s for r in results for s in r["seconds"][setting])
        for setting in results[0]["seconds"]
    }
    print(
        json.dumps(
            {
                "trainings": {
                    setting: [r["runs"][setting] for r in results if r["runs"][setting]]
                    for setting in SETTINGS
                },
                "step_seconds_median": medians,
                "sites_to_gloo": medians["sites"] / medians["gloo"],
                "sites_to_ranks": medians["sites"] / medians["ranks"],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
