"""Runs every script of integration/frameworks with gloo and with distro in each mode.

For the torch of this environment; `integration/matrix` makes environments and calls this in each.
A run passes if all ranks end well, the loss is finite and falls, and

- where nothing is compressed (sharded models, DISTRO_MODE=dense), losses and saved weights equal
  gloo's bit for bit and no exchange is counted;
- where something is compressed (DDP; in modes ef and demo replicas of FSDP, too), every rank counts
  exchanges or compressed reductions, has sent a hundredth of the gradients or less, names the mode
  of each module, and all hold the same reference; and the losses are not gloo's.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import Ended, fork, torchrun
from rows import ROWS, Row

GRADIENT_MODES = ("ef", "demo")
MODES = ("auto", "dense", *GRADIENT_MODES)
# Gradients by what was sent for them, to each of two or four ranks: above it, that is compressed.
LEAST_RATIO = 100
FRAMEWORKS = ("lightning", "accelerate", "transformers")
_LOSS = re.compile(r"\bloss[ =:]+(nan|[-+]?inf|[-+]?[0-9.]+(?:e[-+]?[0-9]+)?)", re.IGNORECASE)

Launcher = Callable[..., Ended]


@dataclasses.dataclass
class Entry:
    """One cell of the matrix."""

    row: str
    mode: str
    torch: str
    passed: bool
    why: str = ""
    seconds: float = 0.0
    losses: list[float] = dataclasses.field(default_factory=list)
    exchanges: int = 0
    payload_bytes_sent: int = 0
    gradient_bytes: int = 0

    @property
    def text(self) -> str:
        return "passed" if self.passed else self.why


@dataclasses.dataclass
class Run:
    """What one run of a script left."""

    ended: Ended
    losses: list[float]
    saved: Path
    stats: list[dict[str, Any]]


def losses_of(output: str) -> list[float]:
    """Every loss that a script has printed, in order."""
    return [float(found) for found in _LOSS.findall(output)]


def run(row: Row, backend: str, mode: str, folder: Path, launcher: Launcher, compiler: str) -> Run:
    """Run a script, twice where the row says so, in an empty folder."""
    saved = folder / "saved.pt"
    env = {}
    arguments = [part.format(folder=folder, compiler=compiler) for part in row.arguments]
    if backend != "distro":
        arguments += [row.backend or "--backend", backend]
    else:
        env = {"DISTRO_MODE": mode, "DISTRO_STATS": f"{folder}/stats.json"}
        env |= {"DISTRO_LOG": "info"}
        if row.backend:
            arguments += [row.backend, backend]
        else:
            env["DISTRO_DEFAULT"] = "1"
            launcher = torchrun  # the variable acts at `import torch`, which forked ranks inherit
    arguments += ["--save", str(saved)]
    sites = row.sites if backend == "distro" and mode not in GRADIENT_MODES else 1
    ended = launcher(row.script, arguments, row.ranks, env, folder, sites=sites)
    losses = losses_of("\n".join(ended.outputs))
    if row.again is not None and ended.succeeded:
        more = [*arguments, *row.again]
        ended = launcher(row.script, more, row.ranks, env, folder, sites=sites)
        losses += losses_of("\n".join(ended.outputs))
    stats = [json.loads(path.read_text()) for path in sorted(folder.glob("stats.rank*.json"))]
    return Run(ended, losses, saved, stats)


def _same(a: Any, b: Any) -> bool:  # noqa: ANN401 - whatever a checkpoint holds
    import torch

    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _why_not_exact(own: Run, gloo: Run) -> str:
    import torch

    if own.losses != gloo.losses:
        return f"losses differ from gloo's: {own.losses[-3:]}, {gloo.losses[-3:]}"
    saved = [torch.load(each.saved, weights_only=False) for each in (own, gloo)]
    if not _same(*saved):
        return "saved weights differ from gloo's"
    return ""


def _why_not_compressed(own: Run, gloo: Run, mode: str) -> str:
    counter = "exchanges" if mode in ("auto", "weights") else "reductions"
    expected = "weights" if mode == "auto" else mode
    references: Counter[tuple[int, int, int]] = Counter()
    for stats in own.stats:
        groups = [stats, *stats["groups"]]
        if all(group[counter] == 0 for group in groups):
            return f"rank {stats['rank']} counts no {counter}"
        modes = [module["mode"] for group in groups for module in group["modules"]]
        if set(modes) != {expected}:
            return f"rank {stats['rank']} has modules in the modes {modes}, not in {expected}"
        payload, dense = (
            sum(group[name] for group in groups)
            for name in ("payload_bytes_sent", "gradient_bytes")
        )
        if payload * LEAST_RATIO > dense:
            return f"rank {stats['rank']} sent {payload} bytes for {dense} bytes of gradients"
        for number, group in enumerate(groups):
            references[number, group["world_size"], group["reference_checksum"]] += 1
    # A process may belong to one of several groups of a kind: the replicas of its shard.
    if any(ranks % size for (_, size, _), ranks in references.items()):
        return "the ranks hold different references"
    if own.losses == gloo.losses:
        return "the losses are gloo's: nothing was compressed"
    return ""


def why_not(row: Row, mode: str, own: Run, gloo: Run) -> str:
    """Why a run does not pass; empty if it does."""
    for name, each in (("gloo", gloo), ("distro", own)):
        if not each.ended.succeeded:
            return f"{name}: {each.ended.why_not()}"
        losses = each.losses
        if len(losses) < 4 or not all(math.isfinite(loss) for loss in losses):
            return f"{name}: losses {losses}"
        third = len(losses) // 3
        if sum(losses[-third:]) >= sum(losses[:third]):
            return f"{name}: the loss does not fall: {losses}"
    said = [output.count(row.says) for output in own.ended.outputs]
    if row.says and mode == "auto" and sum(said) != row.ranks:
        return f"the log says {row.says!r} {said} times"
    if len(own.stats) != row.ranks:
        return f"{len(own.stats)} of {row.ranks} ranks wrote counters: distro was not used"
    if not row.compresses(mode):
        groups = [group for stats in own.stats for group in (stats, *stats["groups"])]
        if any(group["exchanges"] + group["reductions"] for group in groups):
            return "something was compressed"
        return _why_not_exact(own, gloo)
    return _why_not_compressed(own, gloo, mode)


def _reason(text: str) -> str:
    """The words of an error, without the Python around them."""
    if "not available yet" in text:
        return "not available yet"
    return text


def entries(
    rows: list[Row], modes: list[str], launcher: Launcher, compiler: str, keep: Path | None
) -> list[Entry]:
    """Run rows and modes one after the other, and say on stderr how it goes."""
    version = importlib.metadata.version("torch")
    found: list[Entry] = []
    for row in rows:
        if importlib.util.find_spec(row.needs) is None:
            missing = f"{row.needs} is not installed"
            found += [Entry(row.name, mode, version, False, missing) for mode in modes]
            continue
        with tempfile.TemporaryDirectory() as temporary:
            base = (keep or Path(temporary)).resolve() / re.sub(r"\W+", "-", row.name)
            gloo_folder = base / "gloo"
            gloo_folder.mkdir(parents=True)
            gloo = run(row, "gloo", "", gloo_folder, launcher, compiler)
            for mode in modes:
                begin = time.monotonic()
                folder = base / mode
                folder.mkdir()
                own = run(row, "distro", mode, folder, launcher, compiler)
                why = _reason(why_not(row, mode, own, gloo))
                first = own.stats[0] if own.stats else {"groups": []}
                groups = [first, *first["groups"]]
                entry = Entry(
                    row.name,
                    mode,
                    version,
                    not why,
                    why,
                    round(time.monotonic() - begin, 2),
                    own.losses,
                    sum(group.get("exchanges", 0) for group in groups),
                    sum(group.get("payload_bytes_sent", 0) for group in groups),
                    sum(group.get("gradient_bytes", 0) for group in groups),
                )
                found.append(entry)
                print(f"{row.name}, {mode}: {entry.text}", file=sys.stderr, flush=True)
    return found


def versions() -> dict[str, str]:
    """What the entries were run with."""
    names = ("torch", "torch-distro", *FRAMEWORKS)
    installed: dict[str, str] = {}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": sys.version.split()[0], **installed}


def show(documents: list[dict[str, Any]]) -> None:
    """Print the matrix of one torch or of several: a line a script, a column a mode and torch."""
    from rich.console import Console
    from rich.table import Table

    cells = [Entry(**entry) for document in documents for entry in document["entries"]]
    columns = list(dict.fromkeys((cell.mode, cell.torch) for cell in cells))
    table = Table("script")
    for mode, torch in columns:
        table.add_column(f"{mode}\n{torch}", overflow="fold")
    for name in dict.fromkeys(cell.row for cell in cells):
        texts = {(cell.mode, cell.torch): cell.text for cell in cells if cell.row == name}
        table.add_row(name, *(texts.get(column, "") for column in columns))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    for document in documents:
        console.print(", ".join(f"{name} {what}" for name, what in document["versions"].items()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = [row.name for row in ROWS]
    add("--rows", nargs="+", default=names, choices=names, metavar="ROW", help=", ".join(names))
    add("--modes", nargs="+", default=list(MODES), choices=MODES)
    add("--compiler", default="inductor", help="of torch.compile; aot_eager needs no compiler")
    add("--torchrun", action="store_true", help="start each run by torchrun (slower)")
    add("--keep", type=Path, help="a folder for output, counters and checkpoints of every run")
    add("--json", type=Path, help="write the entries there")
    add("--merge", type=Path, nargs="+", help="run nothing, show what earlier --json files hold")
    args = parser.parse_args()

    if args.merge:
        documents = [json.loads(path.read_text()) for path in args.merge]
    else:
        launcher = torchrun if args.torchrun else fork
        rows = [row for row in ROWS if row.name in args.rows]
        found = entries(rows, args.modes, launcher, args.compiler, args.keep)
        document = {
            "versions": versions(),
            "entries": [dataclasses.asdict(entry) for entry in found],
        }
        documents = [document]
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(document, indent=1) + "\n")
    show(documents)
    failed = [entry for document in documents for entry in document["entries"] if entry["why"]]
    return 1 if any("not available" not in entry["why"] for entry in failed) else 0


if __name__ == "__main__":
    sys.exit(main())
