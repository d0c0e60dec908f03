"""Trains the same model with gloo, with distro and with no communication, and shows the difference.

    python integration/compare.py --k 6 32 128 --steps 3000 --width 192

Each run is `train_gpt.py` under torchrun; options that are not listed here go to that script.
Writes results.json, loss.png and each run's log and JSON to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from show import draw_losses, print_tables

SCRIPT = Path(__file__).with_name("train_gpt.py")
ROOT = Path(__file__).resolve().parent.parent
# Of each run rank 0's value is the row's; all ranks' are listed under `per_rank`.
PER_RANK = (
    "train_loss",
    "gradient_bytes",
    "payload_bytes_sent",
    "socket_bytes_sent",
    "step_seconds_median",
)
DISTRO_PER_RANK = ("exact_bytes", "wait_seconds", "reference_checksum")


@dataclass(frozen=True)
class Run:
    """One training of the comparison; `k` is DISTRO_K, for distro only."""

    backend: str
    k: int | None = None

    @property
    def name(self) -> str:
        return self.backend if self.k is None else f"{self.backend}-k{self.k}"

    @property
    def script_backend(self) -> str:
        return "none" if self.backend == "alone" else self.backend


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and those that go to the training script."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    backends = ("gloo", "distro", "alone")
    add("--backends", nargs="+", choices=backends, default=backends)
    add("--ranks", type=int, default=4)
    add("--k", type=int, nargs="+", default=[10], help="one distro run for each DISTRO_K")
    add("--out", type=Path, default=ROOT / "runs" / "quickstart")
    add("--timeout", type=float, default=1800, help="seconds after which a run has failed")
    return parser.parse_known_args()


def pump(source: IO[bytes], log: IO[bytes]) -> None:
    """Copies a child's output to its log and to our stderr, until the child closes it."""
    terminal = sys.stderr.isatty()
    while chunk := os.read(source.fileno(), 1 << 16):
        log.write(chunk)
        log.flush()
        sys.stderr.write(chunk.decode(errors="replace").replace("\r", "\r" if terminal else "\n"))
        sys.stderr.flush()


def stop(child: subprocess.Popen[bytes]) -> None:
    """Ends torchrun, which ends its workers; it gives them 30 seconds."""
    child.terminate()
    try:
        child.wait(45)
    except subprocess.TimeoutExpired:
        child.kill()


def launch(run: Run, args: argparse.Namespace, options: list[str]) -> None:
    """Runs one training to its end. Raises SystemExit when it fails or takes too long."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(args.ranks), str(SCRIPT), "--name", run.name]
    command += ["--backend", run.script_backend, "--out", str(args.out / f"{run.name}.json")]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    environment["COLUMNS"] = str(shutil.get_terminal_size().columns)
    if not sys.stderr.isatty():
        environment["TQDM_MININTERVAL"] = "10"
    if run.k is not None:
        environment["DISTRO_K"] = str(run.k)
    log_path = args.out / f"{run.name}.log"
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            command + options, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert child.stdout is not None
        reader = threading.Thread(target=pump, args=(child.stdout, log), daemon=True)
        reader.start()
        try:
            status: int | None = child.wait(args.timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if child.poll() is None:
                stop(child)
            reader.join(5)
    if status is None:
        sys.exit(f"{run.name} was ended after {args.timeout:.0f} s (--timeout); see {log_path}")
    if status != 0:
        sys.exit(
            f"{run.name} failed with exit status {status}; its output is above, and {log_path}"
        )


def collect(run: Run, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row for results.json, and the loss history, of a run that has ended."""
    path = args.out / f"{run.name}.json"
    result = json.loads(path.read_text())
    val_losses = [result["val_loss"]]
    if run.backend == "alone":  # no rank knows of another, so each has written a file
        for rank in range(1, args.ranks):
            other = json.loads(path.with_suffix(f".rank{rank}.json").read_text())
            result["per_rank"] += other["per_rank"]
            val_losses.append(other["val_loss"])
    first = result["per_rank"][0]
    modes = {"gloo": "dense", "alone": "none"}
    modules = first.get("modules") or [{"mode": os.environ.get("DISTRO_MODE", "auto")}]
    names = PER_RANK + (DISTRO_PER_RANK if run.backend == "distro" else ())
    row = {
        "backend": run.backend,
        "mode": modes.get(run.backend, modules[0]["mode"]),
        "k": run.k,
        "ranks": result["ranks"],
        "steps": result["steps"],
        "parameters": result["parameters"],
        "val_loss": result["val_loss"],
        "val_loss_average": result["val_loss_average"],
        **{name: first[name] for name in names},
        "per_rank": {name: [each[name] for each in result["per_rank"]] for name in names},
    }
    if run.backend == "alone":
        row["per_rank"]["val_loss"] = val_losses
    return row, result["history"]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    args, options = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [
        Run(backend, k)
        for backend in args.backends
        for k in (args.k if backend == "distro" else [None])
    ]
    rows, histories = [], {}
    for number, run in enumerate(runs, start=1):
        print(f"[{number}/{len(runs)}] {run.name}: {args.ranks} ranks", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        launch(run, args, options)
        row, histories[run.name] = collect(run, args)
        row["seconds"] = time.perf_counter() - begin
        rows.append(row)
    results = args.out / "results.json"
    results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw_losses(histories, rows, args.out / "loss.png")
    print_tables(rows)
    print(f"{results}\n{args.out / 'loss.png'}")


if __name__ == "__main__":
    main()
