"""Trains a small Llama by hybrid sharding (HSDP), with gloo, with distro and each replica alone.

    python integration/compare_hybrid.py --steps 500

Each run is `train_llama.py` on two replicas of two shards, by FSDP2 and by FSDP1; options that are
not listed here go to that script. `alone` is each replica by itself: two shards and nobody else.
Losses are of the first replica's own weights, of the mean of the replicas, and beside gloo's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from launch import fork
from rich.console import Console
from show import gap, number, table_of

SCRIPT = Path(__file__).with_name("train_llama.py")
REPLICAS, SHARDS = 2, 2
BACKENDS = ("gloo", "distro", "alone")


@dataclass(frozen=True)
class Run:
    """One training of the comparison."""

    fsdp: int
    backend: str

    @property
    def name(self) -> str:
        return f"FSDP{self.fsdp} {self.backend}"


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and those that go to the training script."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--fsdp", type=int, nargs="+", choices=(1, 2), default=[2, 1])
    add("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    add("--steps", type=int, default=500)
    add("--json", type=Path, help="write the rows there")
    add("--timeout", type=float, default=1800, help="seconds after which a run has failed")
    return parser.parse_known_args()


def train(run: Run, options: list[str], first: int, folder: Path, timeout: float) -> dict[str, Any]:
    """What one call of the script wrote; its ranks are `first` and so on, as far as data goes."""
    replicas = 1 if run.backend == "alone" else REPLICAS
    out = folder / "result.json"
    backend = "gloo" if run.backend == "alone" else run.backend
    own = ["--fsdp", str(run.fsdp), "--backend", backend, "--replicas", str(replicas)]
    own += ["--first-rank", str(first), "--out", str(out)]
    env = {"DISTRO_STATS": str(folder / "stats.json")}
    ended = fork(SCRIPT, [*own, *options], replicas * SHARDS, env, folder, timeout)
    if not ended.succeeded:
        sys.exit(f"{run.name} failed: {ended.why_not()}")
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def counters(folder: Path) -> dict[str, Any]:
    """What the ranks counted in the groups of their replicas."""
    groups = []
    for path in sorted(folder.glob("stats.rank*.json")):
        stats = json.loads(path.read_text())
        found = [group for group in (stats, *stats["groups"]) if group["exchanges"] > 0]
        if len(found) != 1:
            sys.exit(f"rank {stats['rank']} has exchanged modules in {len(found)} groups, not in 1")
        groups += found
    if len(groups) != REPLICAS * SHARDS:
        sys.exit(f"{len(groups)} of {REPLICAS * SHARDS} ranks wrote counters")
    checksums = [group["reference_checksum"] for group in groups]
    peers = REPLICAS - 1
    # Weights are fp32 here, and so gradients are counted; in bf16 they have half of the bytes.
    ratios = [group["gradient_bytes"] / 2 * peers / group["payload_bytes_sent"] for group in groups]
    return {
        "exchanges": groups[0]["exchanges"],
        "modes": sorted({module["mode"] for group in groups for module in group["modules"]}),
        "payload_ratio_bf16": min(ratios),
        "reference_checksums": checksums,
        # Rank r holds the shard r % SHARDS.
        "references_equal": all(
            len(set(checksums[number::SHARDS])) == 1 for number in range(SHARDS)
        ),
    }


def row_of(run: Run, options: list[str], timeout: float) -> dict[str, Any]:
    """Run it, and what there is to say about it."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ranks = range(0, REPLICAS * SHARDS, SHARDS) if run.backend == "alone" else [0]
        results = [train(run, options, first, folder, timeout) for first in ranks]
        per_rank = [each for result in results for each in result["per_rank"]]
        row = {
            "fsdp": run.fsdp,
            "backend": run.backend,
            "torch": torch.__version__,
            "steps": results[0]["steps"],
            "parameters": results[0]["parameters"],
            # Of all replicas: a training loss is of a rank's own batches.
            "train_loss": statistics.fmean(each["train_loss"] for each in per_rank),
            "val_losses": [each["val_loss"] for each in per_rank[::SHARDS]],
            "val_loss_average": per_rank[0]["val_loss_average"],
            "step_seconds_median": per_rank[0]["step_seconds_median"],
            **(counters(folder) if run.backend == "distro" else {}),
        }
    if run.backend == "alone":
        row["val_loss_average"] = None
    row["seconds"] = time.perf_counter() - begin
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    first = rows[0]
    table = table_of(
        f"{REPLICAS} replicas of {SHARDS} shards, {first['parameters']:,} parameters, "
        f"{first['steps']} steps, torch {first['torch']}",
        *("train", "val", "to gloo", "val of mean", "to gloo", "payload of bf16"),
        *("references", "step"),
    )
    gloo = {row["fsdp"]: row["val_losses"][0] for row in rows if row["backend"] == "gloo"}
    for row in rows:
        val = statistics.fmean(row["val_losses"])
        dense = gloo.get(row["fsdp"])
        ratio = row.get("payload_ratio_bf16")
        equal = {True: "equal", False: "DIFFER", None: "-"}[row.get("references_equal")]
        table.add_row(
            Run(row["fsdp"], row["backend"]).name,
            number(row["train_loss"]),
            number(val),
            gap(val, dense),
            number(row["val_loss_average"]),
            gap(row["val_loss_average"], dense),
            number(ratio, ".0f", "x"),
            equal,
            number(row["step_seconds_median"], ".0f", " ms", 1e-3),
        )
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


def main() -> None:
    args, others = arguments()
    options = ["--steps", str(args.steps), *others]
    rows = []
    for run in [Run(fsdp, backend) for fsdp in args.fsdp for backend in args.backends]:
        print(run.name, file=sys.stderr, flush=True)
        rows.append(row_of(run, options, args.timeout))
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(rows)
    if any(row.get("references_equal") is False for row in rows):
        sys.exit("replicas hold different references")


if __name__ == "__main__":
    main()
