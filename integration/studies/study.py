"""Trainings by the hundred: what each method reaches, at which bytes.

    .venv/bin/python integration/studies/study.py run integration/studies/grids/ranks.json
    .venv/bin/python integration/studies/study.py table integration/studies/results/ranks.jsonl

`run` makes every training of a grid that the results do not hold yet, so that it may be stopped
and started again; a line of JSON each, in results/ under the grid's name. `table` and `plot` show
results: each beside dense training and beside participants alone on the same task, steps, batch and
seeds; `gaps` how far above dense runs of several lengths end.

A grid is a list of blocks; each block gives settings of participants.Run, a list where several are
meant, and makes all combinations. Settings with a point (method_settings.k) go into the dictionary
before it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import participants  # noqa: E402
import processes  # noqa: E402
from participants import Run  # noqa: E402
from tqdm import tqdm  # noqa: E402

Result = dict[str, Any]
# Whose losses are looked at: participant 0's, the mean's, the reference's.
WEIGHTS = ("x", "mean", "W")
# What rows of a table that belong together have in common.
COMMON = (
    "engine", "task", "task_settings", "participants", "steps", "batch", "optimizer", "warmup",
    "clip",
)  # fmt: skip


def expand(block: dict[str, Any]) -> Iterator[Run]:
    """All combinations of a block's lists."""
    names = list(block)
    choices = [value if isinstance(value, list) else [value] for value in block.values()]
    for chosen in itertools.product(*choices):
        settings: dict[str, Any] = {}
        for name, value in zip(names, chosen, strict=True):
            outer, _, inner = name.partition(".")
            if inner:
                settings.setdefault(outer, {})[inner] = value
            else:
                settings[outer] = value
        yield Run(**settings)


def key(run: dict[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)


def read(path: Path) -> list[Result]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _one(run: Run, device: str) -> Result:
    import torch

    torch.set_num_threads(1)
    if run.engine == "processes":
        return processes.train(run)
    return participants.train(run, device)


def run_grid(grid: Path, results: Path, jobs: int, device: str) -> int:
    """Make what is missing. The number of trainings that failed."""
    runs = [run for block in json.loads(grid.read_text(encoding="utf-8")) for run in expand(block)]
    done = {key(result["run"]) for result in read(results)}
    missing = list({key(asdict(run)): run for run in runs if key(asdict(run)) not in done}.values())
    # The long ones first, so that none is left over at the end.
    missing.sort(key=lambda run: -run.steps * run.participants * run.batch)
    results.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
        results.open("a", encoding="utf-8") as file,
        tqdm(total=len(runs), initial=len(runs) - len(missing), desc=grid.stem) as progress,
    ):
        futures = {pool.submit(_one, run, device): run for run in missing}
        for future in as_completed(futures):
            try:
                file.write(json.dumps(future.result()) + "\n")
                file.flush()
            except Exception as error:  # the others go on
                failed += 1
                progress.write(f"{futures[future]}: {error!r}", file=sys.stderr)
            progress.update()
    return failed


def _groups(results: Iterable[Result]) -> dict[str, list[Result]]:
    groups = defaultdict(list)
    for result in results:
        groups[key({name: result["run"][name] for name in COMMON})].append(result)
    return groups


def _sorted_groups(results: Iterable[Result]) -> list[tuple[str, list[Result]]]:
    def order(group: tuple[str, list[Result]]) -> tuple[Any, ...]:
        settings = json.loads(group[0])
        names = ("task", "optimizer", "participants", "steps")
        return *(settings[name] for name in names), group[0]

    return sorted(_groups(results).items(), key=order)


def _losses(results: list[Result], which: str) -> list[float]:
    """Of the last evaluation, by seed; empty where the method has no such weights."""
    ordered = sorted(results, key=lambda result: result["run"]["seed"])
    return [result["final"][which] for result in ordered if which in result["final"]]


def _cell(own: list[Result], which: str, dense: float | None) -> str:
    losses, accuracies = _losses(own, which), _losses(own, f"{which} accuracy")
    if not losses:
        return ""
    mean = statistics.fmean(losses)
    spread = f" ±{(max(losses) - min(losses)) / 2:.3f}" if len(losses) > 1 else ""
    more = f" ({100 * (mean / dense - 1):+.1f}%)" if dense else ""
    right = f", {100 * statistics.fmean(accuracies):.1f}% right" if accuracies else ""
    return f"{mean:.3f}{spread}{more}{right}"


def _bests(results: list[Result]) -> dict[str, float]:
    """Method -> the learning rate at which its mean over the seeds is lowest."""
    by = defaultdict(list)
    for result in results:
        by[_name(result), result["run"]["lr"]].append(min(_all_losses(result)))
    best: dict[str, tuple[float, float]] = {}
    for (name, lr), losses in by.items():
        best[name] = min(best.get(name, (float("inf"), lr)), (statistics.fmean(losses), lr))
    return {name: lr for name, (_, lr) in best.items()}


def _all_losses(result: Result) -> list[float]:
    return [result["final"][name] for name in WEIGHTS if name in result["final"]]


def _name(result: Result) -> str:
    run = result["run"]
    settings = ", ".join(
        f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}"
        for name, value in run["method_settings"].items()
    )
    return f"{run['method']} ({settings})" if settings else run["method"]


def table(results: list[Result]) -> str:
    """Markdown: for each setting the methods at dense's best learning rate and at their own."""
    lines = []
    for common, group in _sorted_groups(results):
        settings = json.loads(common)
        size = group[0]["parameters"]
        given = ", ".join(f"{name} {value}" for name, value in settings.items() if value != {})
        lines += [f"**{given}; {size:,} parameters**", ""]
        lines += [
            "| method | lr | x | mean | W | bit a parameter and step | against bf16 | seeds |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        bests = _bests(group)
        dense_lr = bests.get("dense")
        dense = None
        if dense_lr is not None:
            own = [r for r in group if _name(r) == "dense" and r["run"]["lr"] == dense_lr]
            dense = statistics.fmean(_losses(own, "x"))
        rows = sorted({(_name(r), r["run"]["lr"]) for r in group})
        rows.sort(key=lambda row: ({"dense": 0, "alone": 1}.get(row[0], 2), row))
        for name, lr in rows:
            if lr not in (dense_lr, bests[name]):
                continue
            own = [r for r in group if _name(r) == name and r["run"]["lr"] == lr]
            cells = [_cell(own, which, dense) for which in WEIGHTS]
            ratio = own[0]["against_bf16"]
            lines.append(
                f"| {name} | {lr:g}{' (its best)' if lr == bests[name] else ''} | "
                + " | ".join(cells)
                + f" | {own[0]['bits_a_parameter_and_step']:.4f}"
                + f" | {f'{ratio:.3g}x' if ratio else ''} | {len(own)} |"
            )
        lines.append("")
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    """The validation losses of each setting over the steps, one picture with a panel for each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = _sorted_groups(results)
    figure, panels = pyplot.subplots(1, len(groups), figsize=(7 * len(groups), 5), squeeze=False)
    for panel, (common, group) in zip(panels[0], groups, strict=True):
        bests = _bests(group)
        for name in sorted(bests):
            own = [r for r in group if _name(r) == name and r["run"]["lr"] == bests[name]]
            steps = [point["step"] for point in own[0]["curve"]]
            which = "mean" if "mean" in own[0]["final"] and name != "alone" else "x"
            means = [statistics.fmean(r["curve"][i][which] for r in own) for i in range(len(steps))]
            panel.plot(steps, means, label=f"{name}, lr {bests[name]:g} ({which})")
        settings = json.loads(common)
        panel.set_title(f"{settings['task']}, {settings['participants']} participants")
        panel.set_xlabel("steps")
        panel.set_ylabel("validation loss (nats)")
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def plot_gaps(results: list[Result], path: Path) -> None:
    """How far above dense's best loss each method's mean is, over the length of the run: a panel
    for each task and number of participants. Methods at their own best learning rates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # By panel, then by method: (steps, percent).
    panels: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for common, group in _sorted_groups(results):
        settings = json.loads(common)
        bests = _bests(group)
        if len(bests) == 1 or "dense" not in bests:
            continue
        losses = {}
        for name, lr in bests.items():
            own = [r for r in group if _name(r) == name and r["run"]["lr"] == lr]
            which = "mean" if "mean" in own[0]["final"] and name != "alone" else "x"
            losses[name] = statistics.fmean(_losses(own, which))
        title = (
            f"{settings['task']}, {group[0]['parameters']:,} parameters, "
            f"{settings['participants']} participants"
        )
        for name, loss in losses.items():
            if name != "dense":
                point = (settings["steps"], 100 * (loss / losses["dense"] - 1))
                panels[title][name].append(point)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    for axis, (title, methods_of) in zip(axes[0], panels.items(), strict=True):
        for name, points in sorted(methods_of.items()):
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.set_xscale("log")
        axis.set_title(title)
        axis.set_xlabel("steps of the run")
        axis.set_ylabel("% above dense training's loss")
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_run = commands.add_parser("run", help="make what the results of a grid lack")
    to_run.add_argument("grids", type=Path, nargs="+")
    to_run.add_argument("--results", type=Path, default=HERE / "results", help="folder")
    to_run.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at once")
    to_run.add_argument("--device", default="cpu", help="where participants train: cpu, cuda")
    to_show = commands.add_parser("table", help="print results as Markdown")
    to_show.add_argument("results", type=Path, nargs="+")
    for name, what in (("plot", "the curves of results"), ("gaps", "the gaps to dense by steps")):
        to_plot = commands.add_parser(name, help=f"draw {what}")
        to_plot.add_argument("results", type=Path, nargs="+")
        to_plot.add_argument("--out", type=Path, required=True, help="picture")
    args = parser.parse_args()
    if args.command == "run":
        return int(
            any(
                run_grid(grid, args.results / f"{grid.stem}.jsonl", args.jobs, args.device)
                for grid in args.grids
            )
        )
    results = [result for path in args.results for result in read(path)]
    if args.command == "table":
        print(table(results))
    else:
        (plot if args.command == "plot" else plot_gaps)(results, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
