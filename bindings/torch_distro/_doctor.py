"""``torch-distro doctor``: what is installed, what is set, whether two processes can exchange."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

import torch_distro
from torch_distro import _doctor_host, _doctor_torch
from torch_distro._doctor_finding import LEVELS, Finding, failed

CHECKS: dict[str, Callable[[], list[Finding]]] = {
    "versions": _doctor_torch.versions,
    "adapter": _doctor_torch.adapter,
    "entry points": _doctor_torch.entry_points,
    "libraries": _doctor_host.libraries,
    "cpu": _doctor_torch.cpu,
    "variables": _doctor_torch.variables,
    "network": _doctor_host.network,
    "ports": _doctor_host.ports,
    "keys": _doctor_host.keys,
    "relay": _doctor_host.relay,
    "file descriptors": _doctor_host.file_descriptors,
    "gpu": _doctor_torch.gpu,
    "exchange": _doctor_torch.exchange,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    parser.add_argument(
        "--no-exchange",
        action="store_true",
        help="leave out the exchange between two processes, which takes some seconds",
    )


def examine(exchange: bool = True) -> list[Finding]:
    """All findings. A check that breaks is a finding too."""
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        if name == "exchange" and not exchange:
            continue
        try:
            findings += check()
        except Exception as error:
            findings.append(
                failed(
                    name,
                    f"the check itself failed: {type(error).__name__}: {error}",
                    "report this with the output of `torch-distro doctor --json`",
                )
            )
    return findings


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 1 if one of them is a failure."""
    findings = examine(exchange=not arguments.no_exchange)
    worst = max((f.level for f in findings), key=LEVELS.index)
    if arguments.json:
        report = {
            "version": torch_distro.__version__,
            "status": worst,
            "findings": [finding.as_dict() for finding in findings],
        }
        print(json.dumps(report, indent=2))
    else:
        _print(findings)
    return 1 if worst == "failed" else 0


def _print(findings: list[Finding]) -> None:
    if sys.stdout.isatty():
        try:
            return _print_rich(findings)
        except ImportError:
            pass
    for finding in findings:
        print(f"{finding.level:8} {finding.check:17} {finding.found}")
        if finding.advice:
            print(f"{'':26} -> {finding.advice}")


def _print_rich(findings: list[Finding]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "failed": "bold red"}
    table = Table("", "check", "found", box=box.SIMPLE_HEAD)
    for finding in findings:
        found = Text(finding.found)
        if finding.advice:
            found.append(f"\n-> {finding.advice}", style="bold")
        table.add_row(Text(finding.level, style=colours[finding.level]), finding.check, found)
    Console().print(table)
