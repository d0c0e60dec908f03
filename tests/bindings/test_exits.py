"""However a script ends, its processes end by themselves: no abort, no hang, nothing on stderr.

DISTRO_TEST_REPEATS repeats each way of ending (1).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPEATS = int(os.environ.get("DISTRO_TEST_REPEATS", 1))

BEGIN = """
import datetime, os, sys, threading, time
import torch, torch.distributed as dist
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group(
    "distro", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2,
    timeout=datetime.timedelta(seconds=20),
)
dist.all_reduce(torch.ones(10))
"""

IN_FLIGHT = """
works = [dist.all_reduce(torch.ones(200_000), async_op=True) for _ in range(10)]
futures = [work.get_future().then(lambda f: f.value()[0].sum()) for work in works]
"""

FORKED = """
child = os.fork()
if child == 0:
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
dist.all_reduce(torch.ones(10))
"""

THREAD = """
def work():
    while True:
        try:
            dist.all_reduce(torch.ones(1000))
        except dist.DistBackendError:
            time.sleep(10)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
"""

ENDS = {
    "with all left open": FORKED + IN_FLIGHT + THREAD,
    "destroyed with collectives in flight": IN_FLIGHT + "dist.destroy_process_group()",
}


def _end(body: str, folder: Path) -> list[tuple[int, str]]:
    """Exit status and stderr of both ranks."""
    script, store = folder / "script.py", folder / "store"
    script.write_text(BEGIN + body)
    store.unlink(missing_ok=True)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(rank), str(store)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


@pytest.mark.parametrize("end", ENDS)
def test_a_script_without_a_fault_ends_in_silence(end: str, tmp_path: Path) -> None:
    for _ in range(REPEATS):
        assert _end(ENDS[end], tmp_path) == [(0, ""), (0, "")]


def _tracebacks_only(text: str) -> bool:
    lines = [line for line in text.splitlines() if "[distro rank" not in line]
    return all(line.startswith("[rank") for line in lines) and "Traceback" in text


def test_a_rank_that_raises_is_named_with_its_exception(tmp_path: Path) -> None:
    body = "if rank == 1: raise KeyError('a bug')\ndist.all_reduce(torch.ones(10))"
    for _ in range(REPEATS):
        (status, other), (raised, own) = _end(body, tmp_path)
        assert (status, raised) == (1, 1), other + own
        assert own.rstrip().endswith("KeyError: 'a bug'")
        assert "because of rank 1" in other
        assert "ended because of an exception: KeyError: 'a bug'" in other
        assert _tracebacks_only(own), own
        assert _tracebacks_only(other), other


def test_a_rank_that_ends_early_is_named_as_the_one_that_left(tmp_path: Path) -> None:
    body = "if rank == 1: sys.exit(0)\ndist.all_reduce(torch.ones(10))"
    (status, other), early = _end(body, tmp_path)
    assert early == (0, "")
    assert status == 1
    assert "because of rank 1: rank 1 left the group" in other
    assert _tracebacks_only(other), other
