"""Step time of the quick start's training with distro against gloo, on this machine's loopback.

The two are interleaved in one run. One set of processes holds a model on either backend and takes
turns: some steps with gloo, some with distro, and some without any communication, again and again,
so that whatever else the machine does hits all alike. Prints JSON: medians in seconds, the ratios,
and where a step of distro goes (encode, decode, wait: of the backend's own clocks). With more of
torch's threads than cores it shows whether the codec's threads get in their way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch_distro
from spawn import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from train_gpt import GPT

VOCABULARY = 65


def build(args: argparse.Namespace, backend: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module: nn.Module = GPT(VOCABULARY, args.block, args.layers, args.heads, args.width)
    if backend != "none":
        module = DistributedDataParallel(module, process_group=dist.new_group(backend=backend))
    return module, torch.optim.AdamW(module.parameters(), lr=1e-3)


def train(rank: int, ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step by backend, and the counters of distro's group."""
    if args.torch_threads > 0:
        torch.set_num_threads(args.torch_threads)
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(rank)
    seconds: dict[str, list[float]] = {backend: [] for backend in ("none", "gloo", "distro")}
    built = {backend: build(args, backend) for backend in seconds}
    for turn in range(args.turns + 1):
        for backend, (module, optimizer) in built.items():
            dist.barrier()
            for _ in range(args.steps):
                batch = torch.randint(VOCABULARY, (args.batch, args.block + 1), generator=generator)
                begin = time.perf_counter()
                module(batch[:, :-1], batch[:, 1:]).backward()
                optimizer.step()
                optimizer.zero_grad()
                if turn > 0:  # the first turn warms up
                    seconds[backend].append(time.perf_counter() - begin)
    wrapped = built["distro"][0]
    assert isinstance(wrapped, DistributedDataParallel)
    return {
        "seconds": seconds,
        "stats": torch_distro.stats(wrapped.process_group),
        "torch_threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("ranks", 2), ("turns", 10), ("steps", 5), ("batch", 8),
        ("block", 64), ("layers", 2), ("heads", 6), ("width", 192),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--torch-threads", type=int, default=0, help="of each rank (0: as torch)")
    args = parser.parse_args()
    results = run_ranks(args.ranks, train, args)
    medians = {
        backend: statistics.median(s for r in results for s in r["seconds"][backend])
        for backend in results[0]["seconds"]
    }
    stats = results[0]["stats"]
    parts = ("encode_seconds", "decode_seconds", "wait_seconds")
    print(
        json.dumps(
            {
                "ranks": args.ranks,
                "torch_threads": results[0]["torch_threads"],
                "step_seconds_median": medians,
                "distro_to_gloo": medians["distro"] / medians["gloo"],
                "distro_to_no_communication": medians["distro"] / medians["none"],
                "of_a_distro_step": {part: stats[part] / stats["exchanges"] for part in parts},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
