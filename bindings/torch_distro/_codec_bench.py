"""``torch-distro bench codec``: what the codec costs, beside a memcpy and beside PyTorch.

The rows of the codec come from a program of the package (Google Benchmark), those of PyTorch are
the same operations in its own functions. Each is measured in turn with a copy of the same bytes and
the same number of threads in its own process; `ratio` is the median time over the copy's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

ELEMENTS = 6553600
"""Of DDP's default bucket: 25 MiB of fp32."""
SIDE = 2560
TILE = 4096
BLOCK = 64
K = 6
PEERS = 8
# Of PyTorch's rows: at the default, it would look at all weights to take a sixteenth of them.
FEWEST, MOST = 3, 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``torch-distro bench codec``."""
    parser.add_argument(
        "--seconds", type=_positive, default=0.5, help="for each row, at least (%(default)s)"
    )
    parser.add_argument(
        "--filter", type=_regex, default=".", help="rows of the codec: a regular expression"
    )
    parser.add_argument(
        "--no-torch", action="store_true", help="without the rows of PyTorch's own functions"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure and print all rows; 1 if the program of the package fails."""
    from torch_distro._cli import program

    command = [
        str(program("torch-distro-codec-bench")),
        "--benchmark_format=json",
        f"--benchmark_min_time={arguments.seconds}",
        f"--benchmark_filter={arguments.filter}",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        print(
            f"torch-distro bench codec: {command[0]} failed with status {done.returncode}. It "
            "needs the library of Google Benchmark (Debian: libbenchmark1debian).",
            file=sys.stderr,
        )
        return 1
    found = json.loads(done.stdout) if done.stdout.strip() else {"context": {}, "benchmarks": []}
    rows = [_row(benchmark) for benchmark in found["benchmarks"]]
    torch_rows = [] if arguments.no_torch else list(_torch_rows(arguments.seconds))
    for row in torch_rows:
        same = [other["ratio"] for other in rows if other["row"] == row["row"]]
        row["times_the_codec"] = row["ratio"] / same[0] if same else None
    machine = {name: found["context"].get(name) for name in ("num_cpus", "mhz_per_cpu", "load_avg")}
    if arguments.json:
        print(json.dumps({"machine": machine, "codec": rows, "torch": torch_rows}, indent=1))
    else:
        _print(rows, torch_rows)
    return 0


def _row(benchmark: dict[str, Any]) -> dict[str, Any]:
    """A line of Google Benchmark: what is ours of it."""
    counts = ("elements", "threads", "k", "peers")
    measures = (
        "milliseconds",
        "memcpy_milliseconds",
        "ratio",
        "bytes_a_parameter",
        "floor_bytes_a_parameter",
        "bits_a_tile",
        "entropy_bits_a_tile",
    )
    return {
        "row": benchmark["name"].removesuffix("/manual_time"),
        "isa": benchmark["label"],
        **{name: int(benchmark[name]) for name in counts},
        **{name: benchmark[name] for name in measures if name in benchmark},
    }


def _torch_rows(seconds: float) -> Iterator[dict[str, Any]]:
    torch.manual_seed(1)
    before = torch.get_num_threads()
    source, target = torch.randn(ELEMENTS), torch.empty(ELEMENTS)
    try:
        with torch.no_grad():
            for threads in range(1, min(2, len(os.sched_getaffinity(0))) + 1):
                torch.set_num_threads(threads)
                for name, work in _works():
                    times: list[float] = []
                    copies: list[float] = []
                    end = time.perf_counter() + seconds
                    while len(times) < MOST:
                        copies.append(_seconds(lambda: target.copy_(source)))
                        times.append(_seconds(work))
                        if len(times) >= FEWEST and time.perf_counter() > end:
                            break
                    took, copy = statistics.median(times), statistics.median(copies)
                    yield {
                        "row": f"{name}/threads:{threads}",
                        "milliseconds": 1e3 * took,
                        "copy_milliseconds": 1e3 * copy,
                        "ratio": took / copy,
                    }
    finally:
        torch.set_num_threads(before)


def _works() -> Iterator[tuple[str, Callable[[], object]]]:
    """The operations in PyTorch, by the names of the codec's rows."""
    weights = _Weights()
    yield "weights_sync_one_span", weights.sync
    yield f"weights_apply_{PEERS}_peers", weights.apply
    gradients = _Gradients()
    yield "ef_encode", gradients.encode
    for peers in (1, PEERS):
        yield f"ef_decode_{peers}_peers", partial(gradients.decode, peers)


class _Weights:
    """The weights mode in one span: R += what the optimizer did, the largest of each tile as a sign
    and a scale, W and R without them, x = W + share R."""

    share = 0.5

    def __init__(self) -> None:
        self.x = torch.randn(ELEMENTS)
        self.w, self.left = self.x.clone(), torch.empty_like(self.x)
        self.r = torch.randn(ELEMENTS) * 1e-2
        self.sent = [self.select() for _ in range(PEERS)]

    def select(self) -> tuple[Tensor, Tensor]:
        tiles = self.r.view(-1, TILE)
        index = tiles.abs().topk(K, dim=1, sorted=False).indices
        values = tiles.gather(1, index)
        scale = values.abs().mean(1, keepdim=True)
        return index, values.sign() * scale

    def sync(self) -> None:
        torch.add(self.w, self.r, alpha=self.share, out=self.left)
        self.r += torch.sub(self.x, self.left, out=self.left)
        index, values = self.sent[0]
        self.w.view(-1, TILE).scatter_add_(1, index, values)
        self.r.view(-1, TILE).scatter_add_(1, index, -values)
        self.sent[0] = self.select()
        torch.add(self.w, self.r, alpha=self.share, out=self.x)

    def apply(self) -> None:
        tiles = self.w.view(-1, TILE)
        for index, values in self.sent:
            tiles.scatter_add_(1, index, values / PEERS)


class _Gradients:
    """Error feedback over blocks of 64 x 64 in the transform domain, as DeMo's operations are."""

    def __init__(self) -> None:
        place = torch.arange(BLOCK)
        self.basis = torch.cos(torch.pi / BLOCK * (place + 0.5) * place[:, None])
        self.basis *= (2 / BLOCK) ** 0.5
        self.basis[0] /= 2**0.5
        self.gradient = torch.randn(SIDE, SIDE)
        self.m = torch.zeros(ELEMENTS // TILE, TILE)
        self.sent = [self.encode() for _ in range(PEERS)]

    def blocks(self) -> Tensor:
        """[rows of blocks, columns of blocks, 64, 64]: a view of the gradient."""
        return self.gradient.view(SIDE // BLOCK, BLOCK, SIDE // BLOCK, BLOCK).transpose(1, 2)

    def encode(self) -> tuple[Tensor, Tensor]:
        basis = self.basis
        self.m += torch.einsum("ui,abij,vj->abuv", basis, self.blocks(), basis).reshape(-1, TILE)
        index = self.m.abs().topk(K, dim=1, sorted=False).indices
        values = self.m.gather(1, index)
        values = values.sign() * values.abs().mean(1, keepdim=True)
        self.m.scatter_add_(1, index, -values)
        return index, values

    def decode(self, peers: int) -> None:
        total = torch.zeros(ELEMENTS // TILE, TILE)
        for index, values in self.sent[:peers]:
            total.scatter_add_(1, index, values / peers)
        total = total.view(SIDE // BLOCK, SIDE // BLOCK, BLOCK, BLOCK)
        self.blocks().copy_(torch.einsum("ui,abuv,vj->abij", self.basis, total, self.basis))


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _positive(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def _print(rows: list[dict[str, Any]], torch_rows: list[dict[str, Any]]) -> None:
    print(f"{'codec':42}{'isa':8}{'ms':>10}{'of memcpy':>11}{'floor':>8}{'bits a tile':>16}")
    for row in rows:
        bits = ""
        if "bits_a_tile" in row:
            bits = f"{row['bits_a_tile']:.0f} of {row['entropy_bits_a_tile']:.0f}"
        floor = row["floor_bytes_a_parameter"] / 8
        print(
            f"{row['row']:42}{row['isa']:8}{row['milliseconds']:10.3f}{row['ratio']:11.2f}"
            f"{floor:8.2f}{bits:>16}"
        )
    if torch_rows:
        print(f"\n{'PyTorch':50}{'ms':>10}{'of a copy':>11}{'times the codec':>18}")
    for row in torch_rows:
        times = row["times_the_codec"]
        print(
            f"{row['row']:50}{row['milliseconds']:10.3f}{row['ratio']:11.2f}"
            f"{'' if times is None else f'{times:.1f}':>18}"
        )
