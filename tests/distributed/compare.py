"""torch's DistributedTest with gloo and with distro: what passes with gloo must pass with distro.

Usage: compare.py [--ranks 2 4] [--jobs 3] [--json FILE] [TEST ...]

Prints a table for each number of ranks; ends with status 1 if a test passes with gloo only. A test
that fails is tried once more, alone: some of torch's tests depend on the load of the machine.
With SUITE_EXACT=transport in the environment, distro's exact collectives run without gloo.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("gloo", "distro")
Outcomes = dict[str, dict[str, Any]]


def run_part(backend: str, ranks: int, part: str, tests: list[str]) -> Outcomes:
    """Run a part of the tests in a launcher of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "outcomes.json")
        command = [
            sys.executable, str(Path(__file__).with_name("torch_suite.py")),
            "--backend", backend, "--ranks", str(ranks), "--part", part,
            "--output", str(output), *tests,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        return json.loads(output.read_text())


def run_all(backend: str, ranks: int, jobs: int, tests: list[str]) -> Outcomes:
    """Run the tests in parts at the same time, and those that failed once more."""
    with ThreadPoolExecutor(jobs) as pool:
        parts = [
            pool.submit(run_part, backend, ranks, f"{part}/{jobs}", tests) for part in range(jobs)
        ]
        outcomes = {name: what for part in parts for name, what in part.result().items()}
    failed = [name for name, what in outcomes.items() if what["outcome"] == "failed"]
    return outcomes | (run_part(backend, ranks, "0/1", failed) if failed else {})


def compare(outcomes: dict[str, Outcomes]) -> dict[str, list[str]]:
    """Tests by the backends that they pass with."""
    passed = {
        backend: {name for name, what in ran.items() if what["outcome"] == "passed"}
        for backend, ran in outcomes.items()
    }
    failed = {
        name for ran in outcomes.values() for name, w in ran.items() if w["outcome"] == "failed"
    }
    gloo, distro = passed["gloo"], passed["distro"]
    return {
        "passed_with_both": sorted(gloo & distro),
        "passed_with_gloo_only": sorted(gloo - distro),
        "passed_with_distro_only": sorted(distro - gloo),
        "failed_with_both": sorted(failed - gloo - distro),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--jobs", type=int, default=3, help="launchers at the same time")
    parser.add_argument("--json", type=Path, help="write the names and the errors here")
    parser.add_argument("tests", nargs="*", metavar="TEST", help="names or patterns; all if none")
    options = parser.parse_args()
    report: list[dict[str, Any]] = []
    print(
        f"torch {torch.__version__}\n"
        f"{'ranks':>5}{'both':>7}{'gloo only':>12}{'distro only':>13}{'neither':>10}"
    )
    for ranks in options.ranks:
        outcomes = {b: run_all(b, ranks, options.jobs, options.tests) for b in BACKENDS}
        table = compare(outcomes)
        counts = [len(names) for names in table.values()]
        print(f"{ranks:>5}{counts[0]:>7}{counts[1]:>12}{counts[2]:>13}{counts[3]:>10}", flush=True)
        for kind in ("passed_with_gloo_only", "passed_with_distro_only", "failed_with_both"):
            for name in table[kind]:
                print(f"      {kind.replace('_', ' ')}: {name}")
        texts = {n: outcomes["distro"][n]["text"] for n in table["passed_with_gloo_only"]}
        report.append({"torch": torch.__version__, "ranks": ranks, **table, "errors": texts})
        for name, text in texts.items():
            print(f"{name}:\n{text}", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(entry["passed_with_gloo_only"] for entry in report))


if __name__ == "__main__":
    sys.exit(main())
