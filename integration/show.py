"""Shows a comparison: tables for the terminal, and the loss curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]
SMOOTH = 25  # steps over which the training loss is averaged in the picture
COLOURS = {"gloo": "black", "alone": "tab:red"}


def name_of(row: Row) -> str:
    """`gloo`, `distro k=6` or `alone`."""
    return row["backend"] if row["k"] is None else f"{row['backend']} k={row['k']}"


def gap(loss: float | None, dense: float | None) -> str:
    """How much higher a loss is than the dense run's, in percent."""
    return "" if loss is None or dense is None else f"{100 * (loss / dense - 1):+.1f} %"


def number(value: float | None, form: str = ".3f", unit: str = "", scale: float = 1) -> str:
    """A value in a unit of `scale`; a dash for one that is not known."""
    return "-" if value is None else f"{value / scale:{form}}{unit}"


def megabytes(count: float | None) -> str:
    return number(count, ",.2f" if count is not None and count < 1e8 else ",.0f", " MB", 1e6)


def ratio(dense_bytes: float, sent: float | None) -> str:
    return f"{dense_bytes / sent:,.0f}x" if sent else "-"


def table_of(title: str, *headings: str) -> Table:
    table = Table("run", title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def losses_table(rows: Sequence[Row]) -> Table:
    """Losses in nats a character, beside the dense run's."""
    dense = next((row["val_loss"] for row in rows if row["backend"] == "gloo"), None)
    ranks, steps = rows[0]["ranks"], rows[0]["steps"]
    table = table_of(
        f"Loss: {rows[0]['parameters']:,} parameters, {ranks} ranks, {steps} steps",
        *("train", "val", "to gloo", "val of mean", "to gloo", "step", "whole run"),
    )
    for row in rows:
        table.add_row(
            name_of(row),
            number(row["train_loss"]),
            number(row["val_loss"]),
            gap(row["val_loss"], dense),
            number(row["val_loss_average"]),
            gap(row["val_loss_average"], dense),
            number(row["step_seconds_median"], ".0f", " ms", 1e-3),
            number(row["seconds"], ".0f", " s"),
        )
    return table


def bytes_table(rows: Sequence[Row]) -> Table:
    """Bytes that rank 0 sent, by both ways of counting.

    Every peer gets a payload, so it stands against a whole gradient to every peer. All that crossed
    the sockets stands against a ring all-reduce, which sends 2 (n - 1) / n gradients.
    """
    table = table_of(
        "Bytes sent by rank 0",
        *("gradients", "payload", "of fp32", "of bf16", "sockets", "of fp32 ring", "of bf16 ring"),
        "exact",
    )
    for row in rows:
        peers = row["ranks"] - 1
        gradient, sent = row["gradient_bytes"], row["socket_bytes_sent"]
        broadcast, ring = gradient * peers, gradient * 2 * peers / row["ranks"]
        table.add_row(
            name_of(row),
            megabytes(gradient),
            megabytes(row["payload_bytes_sent"]),
            ratio(broadcast, row["payload_bytes_sent"]),
            ratio(broadcast / 2, row["payload_bytes_sent"]),
            megabytes(sent),
            ratio(ring, sent),
            ratio(ring / 2, sent),
            megabytes(row.get("exact_bytes")),
        )
    return table


EXPLANATION = """\
val: rank 0's own weights; val of mean: the mean of all ranks' weights, which ends a training.
payload: against a whole gradient to every peer. sockets: all that crossed them (headers,
acknowledgements, resends) against a ring all-reduce. exact: other collectives and the final mean.
distro has to beat alone, and comes nearer to gloo with time: a short run of a small model sends too
few bits to follow it closely. See it with --steps 3000, and with --k 10 32 128.
"""


def print_tables(rows: Sequence[Row]) -> None:
    """Both tables, and how to read them, to stdout."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(losses_table(rows), bytes_table(rows), EXPLANATION, sep="\n", highlight=False)


def draw_losses(
    histories: Mapping[str, Mapping[str, Any]], rows: Sequence[Row], path: Path
) -> None:
    """Training and validation loss by step, one colour a run; a star is the mean's loss."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    others = iter(matplotlib.colormaps["viridis"](np.linspace(0, 0.8, len(rows))))
    for row, history in zip(rows, histories.values(), strict=True):
        colour = COLOURS.get(row["backend"]) or next(others)
        train = np.asarray(history["train"])
        span = min(SMOOTH, len(train))
        smooth = np.convolve(train, np.full(span, 1 / span), mode="valid")
        left.plot(np.arange(span, len(train) + 1), smooth, color=colour, label=name_of(row))
        steps, losses = zip(*history["validation"], strict=True)
        label = f"{name_of(row)}: {row['val_loss']:.3f}"
        if row["backend"] == "distro":
            label += f", mean of ranks (star) {row['val_loss_average']:.3f}"
            right.plot(steps[-1], row["val_loss_average"], "*", color=colour, markersize=11)
        right.plot(steps, losses, "o-", color=colour, label=label, markersize=4)
    left.set_title(f"training, rank 0 (mean of {SMOOTH} steps)")
    right.set_title("validation, rank 0's own weights")
    left.set_ylabel("loss (nats a character)")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    first = rows[0]
    figure.suptitle(f"Character GPT, {first['parameters']:,} parameters, {first['ranks']} ranks")
    figure.savefig(path, dpi=120)
