"""Run a part of torch's DistributedTest on one backend; the outcome of each test as JSON.

Usage: torch_suite.py --backend distro --ranks 2 [--part 0/3] [--output FILE] [TEST ...]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import tempfile
import time
import traceback
import unittest
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

PRELOADED = ["case", "torch._dynamo", "torch_distro._attach", "torch_distro._stats"]


class Recorder(unittest.TestResult):
    """Outcome, text and seconds of every test, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: dict[str, dict[str, Any]] = {}
        self._began = 0.0

    def startTest(self, test: unittest.TestCase) -> None:  # noqa: N802 - unittest's name
        super().startTest(test)
        self._began = time.monotonic()

    def _record(self, test: unittest.TestCase, outcome: str, text: str = "") -> None:
        self.outcomes[test._testMethodName] = {
            "outcome": outcome,
            "text": text,
            "seconds": round(time.monotonic() - self._began, 2),
        }

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        self._record(test, "passed")

    def addError(self, test: unittest.TestCase, err: Any) -> None:  # noqa: ANN401, N802
        self._record(test, "failed", "".join(traceback.format_exception(*err)))

    addFailure = addError  # noqa: N815

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:  # noqa: N802
        self._record(test, "skipped", reason)


def names(patterns: list[str], part: int, parts: int) -> list[str]:
    """The tests to run, by name: those that match, and of these every `parts`-th."""
    from case import TestDistributed

    found = unittest.defaultTestLoader.getTestCaseNames(TestDistributed)
    chosen = [n for n in found if any(fnmatch.fnmatchcase(n, p) for p in patterns or ["*"])]
    return list(chosen)[part::parts]


def run(patterns: list[str], part: int, parts: int) -> dict[str, dict[str, Any]]:
    from case import TestDistributed

    recorder = Recorder()
    suite = unittest.TestSuite(TestDistributed(name) for name in names(patterns, part, parts))
    with Path(os.devnull).open("w") as quiet:
        sys.stdout, stdout = quiet, sys.stdout
        try:
            suite.run(recorder)
        finally:
            sys.stdout = stdout
    return recorder.outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--part", default="0/1", help="this part of so many, such as 0/3")
    parser.add_argument("--output", type=Path)
    parser.add_argument("tests", nargs="*", metavar="TEST", help="names or patterns; all if none")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))

    here = str(Path(__file__).parent)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(
            SUITE_BACKEND=options.backend,
            WORLD_SIZE=str(options.ranks),
            TEMP_DIR=folder,
            PYTHONPATH=os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
            OMP_NUM_THREADS="1",
        )
        os.environ.setdefault("DISTRIBUTED_TESTS_DEFAULT_TIMEOUT", "100")
        mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
        outcomes = run(options.tests, part, parts)
    text = json.dumps(outcomes, indent=1)
    options.output.write_text(text) if options.output else print(text)


if __name__ == "__main__":
    main()
