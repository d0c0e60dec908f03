"""A short campaign of faults during trainings over an emulated internet, by mesh and by hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch_distro._wan.internet import unavailable

CAMPAIGN = Path(__file__).resolve().parents[2] / "integration" / "fault_campaign.py"
REASON = unavailable()
emulated = pytest.mark.skipif(bool(REASON), reason=REASON)
FAULTS, KILLS = 24, 2


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CAMPAIGN), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


# Two minutes on two cores of one's own; each wait within it has a limit of its own.
@pytest.mark.timeout(1200)
@emulated
def test_nothing_comes_of_faults_and_a_lost_rank_is_named(tmp_path: Path) -> None:
    seed = os.environ.get("TEST_SEED", "20240607")
    ended = run(
        *("--faults", FAULTS, "--kills", KILLS, "--seed", seed, "--modes", "auto"),
        *("--minutes", 1000, "--folder", tmp_path / "outputs"),
    )
    assert ended.returncode == 0, f"seed {seed}\n{ended.stdout}\n{ended.stderr}"
    report: dict[str, Any] = json.loads(ended.stdout)
    assert report["seed"] == int(seed)
    assert report["topologies"] == ["mesh", "hub"]
    assert report["faults"] >= FAULTS
    assert sum(report["faults_by_kind"].values()) == report["faults"]
    assert sum(report["lost_for_good"].values()) == KILLS
    assert report["hangs"] == 0
    assert report["wrong"] == []
    # That they hit something: broken connections were made again.
    assert report["counters"]["reconnects"] > 0
