"""Runs a training script of which one rank kills itself in the middle, and notes what happens when.

    torchrun ... doomed.py SCRIPT ARGUMENTS...

DOOM is JSON: `folder` (for the notes), `rank`, `step` (after so many optimizer steps) and `delay`
(seconds after that step). A rank is killed once, not again after the restart. With `stays` the
others do not heed torchrun, which ends them a tenth of a second later, and say what they have to.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

DOOM = json.loads(os.environ["DOOM"])
FOLDER = Path(DOOM["folder"])
RANK = int(os.environ["RANK"])
KILLED = FOLDER / "killed"
life = 1 if KILLED.exists() else 0
steps = 0


def note(event: str, **more: str) -> None:
    line = json.dumps({"event": event, "life": life, "rank": RANK, "time": time.time(), **more})
    with (FOLDER / f"rank{RANK}.jsonl").open("a", encoding="utf-8") as notes:
        notes.write(line + "\n")


def kill() -> None:
    time.sleep(DOOM["delay"])
    KILLED.touch()
    note("killed")
    os.kill(os.getpid(), signal.SIGKILL)


def after_step(_optimizer: object, _args: object, _kwargs: object) -> None:
    global steps
    steps += 1
    if steps == 1:
        note("first step")
    if life == 0 and DOOM["rank"] == RANK and steps == DOOM["step"]:
        threading.Thread(target=kill, daemon=True).start()


def main() -> None:
    torch.set_num_threads(1)
    register_optimizer_step_post_hook(after_step)
    note("start")
    if DOOM["stays"] and life == 0:
        signal.signal(signal.SIGTERM, lambda *_: None)
    sys.argv = sys.argv[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except dist.DistBackendError as error:
        note("error", text=str(error))
        raise
    note("end")


if __name__ == "__main__":
    main()
