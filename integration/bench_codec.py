"""Seconds of the weights codec at a step, for the weights of GPT-2 small, on any device.

No group and no network: the records of all ranks are at hand. Prints JSON: the codec's step beside
AdamW's of the same weights, both as the script's thread sees them (the device has done its work).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import torch
from bench_bytes import gpt2_small
from torch_distro._extension import extension


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of a call."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


class Rank:
    """One of several ranks with the same moves: every record of the exchange is its own."""

    def __init__(self, ranks: int, k: int, device: torch.device) -> None:
        core = extension()
        self.ranks = ranks
        self.weights = [torch.randn(shape, device=device) for shape in gpt2_small()]
        for weight in self.weights:
            weight.grad = torch.randn_like(weight)
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-3, foreach=True)
        spread = core.default_spread_steps(k, 1)
        self.codec = core.Codec(
            [weight.numel() for weight in self.weights],
            k,
            1,
            None if device.type == "cpu" else device,
            core.default_turns(k),
            spread,
        )
        self.gain = math.sqrt(ranks)
        self.share = core.default_share(self.gain, ranks, k, spread)
        self.codec.begin(self.weights)
        self.number = 0
        self.record: bytes | None = None

    def exchange(self) -> None:
        due = (
            None if self.record is None else ([self.record] * self.ranks, 0, self.gain, self.number)
        )
        self.number += 1
        self.record, _ = self.codec.advance(self.weights, self.number, due, self.share, self.share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    device = torch.device(args.device)
    rank = Rank(args.ranks, args.k, device)
    for _ in range(20):  # all turns once: what is allocated is kept
        rank.optimizer.step()
        rank.exchange()
    optimizer = seconds(lambda: rank.optimizer.step(), device, args.repeats)
    exchange = seconds(rank.exchange, device, args.repeats)
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "weights": sum(weight.numel() for weight in rank.weights),
                "ranks": args.ranks,
                "k": args.k,
                "record_bytes": len(rank.record or b""),
                "optimizer_seconds": optimizer,
                "exchange_seconds": exchange,
                "exchange_of_optimizer": exchange / optimizer,
            }
        )
    )


if __name__ == "__main__":
    main()
