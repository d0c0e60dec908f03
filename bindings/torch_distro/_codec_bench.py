"""``torch-distro bench codec``: what the codec costs, beside a memcpy and beside PyTorch.

The rows of the codec come from a program of the package (Google Benchmark), those of PyTorch are
the same operations in its own functions. Each is measured in turn with a copy of the same bytes and
the same number of threads in its own process; `ratio` is the median time over the copy's.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from typing import Any


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
    from torch_distro import _codec_bench_torch
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
    torch_rows = [] if arguments.no_torch else list(_codec_bench_torch.rows(arguments.seconds))
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
        "slower_to_faster",
    )
    return {
        "row": benchmark["name"].removesuffix("/manual_time"),
        "isa": benchmark["label"],
        **{name: int(benchmark[name]) for name in counts},
        **{name: benchmark[name] for name in measures if name in benchmark},
    }


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
    print(f"{'codec':46}{'isa':8}{'ms':>10}{'of memcpy':>11}{'floor':>8}{'bits a tile':>16}")
    for row in rows:
        bits = ""
        if "bits_a_tile" in row:
            bits = f"{row['bits_a_tile']:.0f} of {row['entropy_bits_a_tile']:.0f}"
        floor = row["floor_bytes_a_parameter"] / 8
        print(
            f"{row['row']:46}{row['isa']:8}{row['milliseconds']:10.3f}{row['ratio']:11.2f}"
            f"{floor:8.2f}{bits:>16}"
        )
    if torch_rows:
        print(f"\n{'PyTorch':54}{'ms':>10}{'of a copy':>11}{'times the codec':>18}")
    for row in torch_rows:
        times = row["times_the_codec"]
        print(
            f"{row['row']:54}{row['milliseconds']:10.3f}{row['ratio']:11.2f}"
            f"{'' if times is None else f'{times:.1f}':>18}"
        )
