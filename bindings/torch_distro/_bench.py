"""``torch-distro bench``: what costs how much; one subcommand a bench, loaded when it runs."""

from __future__ import annotations

import argparse
import importlib

BENCHES = {
    "codec": (
        "torch_distro._codec_bench",
        "times of the codec over 25 MiB, beside a memcpy and beside PyTorch's own functions",
    ),
    "wan": (
        "torch_distro._wan.bench",
        "step times over home lines, beside gloo, PowerSGD, bf16 and no communication at all",
    ),
}
"""Name -> module, summary."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benches and their options."""
    benches = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    for name, (module, summary) in BENCHES.items():
        bench = benches.add_parser(name, help=summary, description=f"{summary}.".capitalize())
        # Before or after the bench's name.
        json_help = "print JSON instead of text"
        bench.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=json_help)
        importlib.import_module(module).add_arguments(bench)


def run(arguments: argparse.Namespace) -> int:
    """Run one bench; its exit status."""
    module, _ = BENCHES[arguments.bench]
    status: int = importlib.import_module(module).run(arguments)
    return status
