"""A rank is killed or stopped in the middle of everything a group can do.

Usage: faults.py [--kinds NAME ...] [--faults kill stop] [--at-once 8]

Each kind of operation has a group of three: ranks 0 and 1, which survive and take part in all
kinds at the same time, one thread each; and rank 2, a process of its own, which dies while it
repeats the operation. Both survivors must get a DistBackendError that names rank 2 within the
group's time-out (and some seconds to find out who it is); a survivor that hangs fails the launch.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "bindings")]

import random_program  # noqa: E402
from ranks import RankError, launch  # noqa: E402

TIMEOUT_SECONDS = 4.0
DEADLINE_SECONDS = 90.0
SETUP_SECONDS = 60.0  # less: who fails in it says so before the launch is taken for hanging
SURVIVORS, VICTIM = [0, 1], 2  # ranks in each group
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}

COLLECTIVES: dict[str, Callable[[random_program.Step], random_program.Started]] = {
    collective.__name__: collective
    for collective in random_program.COLLECTIVES
    if collective is not random_program.tagged_pair  # its third rank has nothing to do
}
OTHERS = ["exchange", "average", "rendezvous", "inner_connection", "destroy"]
KINDS = [*COLLECTIVES, *OTHERS]


def _fault_soon(fault: str, delay: float = 0.2) -> None:
    def act() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), SIGNALS[fault])

    threading.Thread(target=act, daemon=True).start()


def _repeat_collective(kind: str, group: dist.ProcessGroup, rank: int) -> None:
    number = 0
    while True:
        number += 1
        step = random_program.Step(
            group=group,
            gloo=False,
            ranks=dist.get_process_group_ranks(group),
            draw=random.Random(number),
            values=torch.Generator().manual_seed(rank),
            dtype=torch.float32,
            operator=dist.ReduceOp.SUM,
        )
        _, works, _ = COLLECTIVES[kind](step)
        for work in works:
            if work is not None:
                work.wait()


def _repeat_exchange(kind: str, group: dist.ProcessGroup, rank: int) -> None:
    import torch_distro
    from models import batches, train, wrapped

    module = wrapped(process_group=group)
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer, batches(rank, 2))
    while True:
        if kind == "average":
            torch_distro.average(module)
        else:
            train(module, optimizer, batches(rank, 1))


def _meet(kind: str, store: dist.Store, rank: int, fault: str) -> None:
    """Rank 2 dies before it comes, or between the rendezvous and the inner backend's own."""
    from torch_distro import _backend, _inner

    if rank == VICTIM and kind == "rendezvous":
        os.kill(os.getpid(), SIGNALS[fault])
    if rank == VICTIM:
        vars(_inner)["_gloo"] = lambda *_: os.kill(os.getpid(), SIGNALS[fault])
    _backend.create(
        types.SimpleNamespace(
            store=dist.PrefixStore(f"test/{kind}", store),
            group_rank=rank,
            group_size=3,
            global_ranks_in_group=[],
            timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS),
        )
    )


def _operate(kind: str, group: Any, store: dist.Store, rank: int, fault: str) -> None:  # noqa: ANN401
    """Run the operation until it fails; rank 2 dies meanwhile."""
    if kind in ("rendezvous", "inner_connection"):
        _meet(kind, store, rank, fault)
        return
    dist.barrier(group=group)
    if kind == "destroy":
        if rank == VICTIM:
            os.kill(os.getpid(), SIGNALS[fault])
        dist.destroy_process_group(group)  # tells of what it could not deliver, in the log
        return
    if rank == VICTIM:
        _fault_soon(fault)
    (_repeat_collective if kind in COLLECTIVES else _repeat_exchange)(kind, group, rank)


def _survive(kind: str, *arguments: Any) -> str:  # noqa: ANN401
    try:
        _operate(kind, *arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _rank(rank: int, size: int, kinds: list[str], fault: str, path: str) -> dict[str, str]:
    store = dist.FileStore(path, size)
    long = datetime.timedelta(seconds=SETUP_SECONDS)
    # Nothing goes through the world's own group, and gloo on a busy machine sometimes fails to
    # connect ten ranks ("Connection closed by peer"), after which the rest wait for each other.
    with mock.patch.dict(os.environ, {"TORCH_GLOO_LAZY_INIT": "1"}):
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=long)
    groups = {
        kind: dist.new_group(
            [*SURVIVORS, VICTIM + i],
            backend="distro",
            timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS),
        )
        for i, kind in enumerate(kinds)
        if kind not in ("rendezvous", "inner_connection")
    }
    if rank not in SURVIVORS:
        kind = kinds[rank - VICTIM]
        _operate(kind, groups.get(kind), store, VICTIM, fault)
        return {}
    said: dict[str, str] = {}

    def survive(kind: str) -> None:
        said[kind] = _survive(kind, groups.get(kind), store, rank, fault)

    threads = [threading.Thread(target=survive, args=(kind,)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.set(f"survived/{rank}", "")  # who leaves first would be blamed by the other
    store.wait([f"survived/{other}" for other in SURVIVORS], long)
    return said


def blame(kinds: list[str], fault: str) -> list[str]:
    """What is wrong: one line for each kind and survivor that did not say what it should."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/world"
        outcome = launch(
            VICTIM + len(kinds),
            _rank,
            kinds,
            fault,
            path,
            backend=None,
            deadline=DEADLINE_SECONDS,
            awaited=SURVIVORS,  # some victims are stopped
        )
    wrong = [str(result) for result in outcome if isinstance(result, RankError)]
    for rank in SURVIVORS:
        said = outcome[rank]
        if not isinstance(said, dict):
            wrong.append(f"{fault}: rank {rank} says {said}")
            continue
        for kind in kinds:
            text = said[kind]
            named = text.startswith("DistBackendError: ") and f"rank {VICTIM}" in text
            if named == (kind == "destroy") or (kind == "destroy" and text):
                wrong.append(f"{fault} during {kind}: rank {rank} says '{text}'")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="NAME")
    parser.add_argument("--faults", nargs="+", choices=list(SIGNALS), default=list(SIGNALS))
    parser.add_argument("--at-once", type=int, default=8, help="kinds in one launch")
    options = parser.parse_args()
    wrong: list[str] = []
    for fault in options.faults:
        for begin in range(0, len(options.kinds), options.at_once):
            kinds = options.kinds[begin : begin + options.at_once]
            began = time.monotonic()
            found = blame(kinds, fault)
            verdict = "named by both survivors" if not found else "WRONG"
            print(
                f"{fault:5} {time.monotonic() - began:5.1f} s  {verdict}: {', '.join(kinds)}",
                flush=True,
            )
            print("\n".join(found), end="\n" if found else "")
            wrong += found
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
