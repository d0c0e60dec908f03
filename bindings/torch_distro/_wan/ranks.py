"""The ranks of one row of the bench: a training on each host, which steps when it is told to."""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch_distro._wan.internet import Internet


class RanksError(RuntimeError):
    """A training has ended, or does not come to an end: which rank, and its last words."""


class Ranks:
    """Trainings on the hosts 0, 1, ... of an internet, until close().

    Args:
        arguments: of `torch_distro._wan.training`.
        env: further variables, the same on all.
    """

    def __init__(
        self, internet: Internet, arguments: Sequence[str], env: Mapping[str, str]
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="distro-wan-")
        self._processes: list[subprocess.Popen[str]] = []
        for rank in range(internet.ranks):
            with self._words_of(rank).open("w") as words:
                process = internet.popen(
                    rank,
                    [sys.executable, "-m", "torch_distro._wan.training", *arguments],
                    env={
                        "RANK": str(rank),
                        "WORLD_SIZE": str(internet.ranks),
                        "LOCAL_RANK": "0",
                        "LOCAL_WORLD_SIZE": "1",
                        "MASTER_ADDR": internet.addresses[0],
                        "MASTER_PORT": "29500",
                        "OMP_NUM_THREADS": "1",
                        **env,
                    },
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=words,
                )
            self._processes.append(process)

    def step(self, number: int, deadline: float) -> list[dict[str, Any]]:
        """So many steps on each rank; what each says.

        Raises:
            RanksError: a rank has ended, or one is not ready `deadline` seconds later.
        """
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # its words say why
                process.stdin.write(f"{number}\n")
                process.stdin.flush()
        return self._answers(deadline)

    def end(self, deadline: float) -> None:
        """End the trainings, each in its own time.

        Raises:
            RanksError: as step().
        """
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        self._answers(deadline)
        for process in self._processes:
            process.wait()

    def close(self) -> None:
        """Kill those that still run. Idempotent."""
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()
        self._folder.cleanup()

    def _words_of(self, rank: int) -> Path:
        return Path(self._folder.name, f"rank{rank}.txt")

    def _answers(self, deadline: float) -> list[dict[str, Any]]:
        end = time.monotonic() + deadline
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self._processes):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while len(answers) < len(self._processes):
                ready = selector.select(max(0.0, end - time.monotonic()))
                if not ready:
                    late = [r for r in range(len(self._processes)) if r not in answers]
                    raise RanksError(f"rank {late[0]} is not ready after {deadline:.0f} s")
                for key, _ in ready:
                    # Whole lines are written at once.
                    line: str = key.fileobj.readline()  # type: ignore[union-attr]
                    if not line:
                        raise RanksError(self._why(key.data))
                    if line.startswith("{"):  # others are a library's
                        answers[key.data] = json.loads(line)
                        selector.unregister(key.fileobj)
        return [answers[rank] for rank in range(len(self._processes))]

    def _why(self, rank: int) -> str:
        lines = [line for line in self._words_of(rank).read_text().splitlines() if line.strip()]
        code = self._processes[rank].wait()
        said = next((line for line in reversed(lines) if "Error" in line), "".join(lines[-1:]))
        return f"rank {rank} has ended with exit code {code}: {said.strip()}"


@contextlib.contextmanager
def pinging(internet: Internet, host: int, peer: int) -> Iterator[list[float | None]]:
    """While the block runs, seconds of a ping, five times a second; None: it was lost.

    What people beside the training feel.
    """
    times: list[float | None] = []
    ended = threading.Event()

    def ping() -> None:
        while not ended.wait(0.2):
            times.append(internet.ping(host, peer))

    thread = threading.Thread(target=ping)
    thread.start()
    try:
        yield times
    finally:
        ended.set()
        thread.join()
