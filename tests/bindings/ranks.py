"""Run a function as every rank of a process group, each in a process of its own."""

from __future__ import annotations

import datetime
import faulthandler
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch_distro

TIMEOUT_SECONDS = 60
# Of torch: (2, 15).
MINOR = tuple(int(part) for part in torch.__version__.split(".")[:2])

# What runs exact collectives in every test that makes its group here: TEST_EXACT=transport.
OPTIONS = {"exact": os.environ["TEST_EXACT"]} if "TEST_EXACT" in os.environ else {}

PRELOADED = [
    "torch",
    "torch.distributed.optim",
    "torch._dynamo",
    "torch_distro._attach",
    "torch_distro._stats",
]


def _child(
    rank: int,
    size: int,
    backend: str | None,
    path: str,
    env: dict[str, str],
    timeout: float,
    options: dict[str, Any] | None,
    queue: Any,  # noqa: ANN401
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    faulthandler.register(signal.SIGUSR1)  # launch() asks those that hang where they are
    os.environ.update(env)
    dist.set_debug_level_from_env()
    torch.set_num_threads(1)
    try:
        options = {**OPTIONS, **(options or {})}
        if backend:
            dist.init_process_group(
                backend,
                store=dist.FileStore(path, size),
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(seconds=timeout),
                pg_options=torch_distro.Options(**options) if options else None,
            )
        result = function(rank, size, *arguments)
        if dist.is_initialized():
            dist.destroy_process_group()
        queue.put(pickle.dumps((rank, result, None)))
    except BaseException as error:
        queue.put(
            pickle.dumps((rank, None, (type(error).__name__, str(error), traceback.format_exc())))
        )


class RankError(AssertionError):
    """What a rank raised."""

    def __init__(self, rank: int, kind: str, message: str, trace: str) -> None:
        super().__init__(f"rank {rank}: {trace}")
        self.rank, self.kind, self.message = rank, kind, message


def _show_stacks(processes: Iterable[int | None]) -> None:
    """On stderr: where the threads of these processes are."""
    for process in processes:
        if process is not None:
            os.kill(process, signal.SIGUSR1)
            time.sleep(0.2)  # one after the other


def launch(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,  # noqa: ANN401
    backend: str | None = "distro",
    env: dict[str, str] | Sequence[dict[str, str]] | None = None,
    timeout: float = TIMEOUT_SECONDS,
    options: dict[str, Any] | None = None,
    deadline: float = 120.0,
    awaited: Collection[int] | None = None,
    start: str = "forkserver",
) -> list[Any | RankError | None]:
    """Result or error of each rank; None where a rank died without a word.

    `env`: of all ranks, or by rank. Fails when a rank is still running after `deadline` seconds: a
    hang is a failure by itself. Where `awaited` ranks are given, the others are killed when those
    have ended. `start`: as of multiprocessing.
    """
    context: Any = mp.get_context(start)
    if start == "forkserver":
        # The server has torch loaded, and each rank starts in milliseconds, not in seconds.
        context.set_forkserver_preload(PRELOADED)
    queue = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_child,
                args=(
                    rank,
                    size,
                    backend,
                    f"{folder}/store",
                    (env or {}) if not isinstance(env, Sequence) else env[rank],
                    timeout,
                    options,
                    queue,
                    function,
                    arguments,
                ),
            )
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        outcome: list[Any | RankError | None] = [None] * size
        end = time.monotonic() + deadline
        try:
            watched = [processes[rank] for rank in (range(size) if awaited is None else awaited)]
            while any(process.is_alive() for process in watched) or not queue.empty():
                while not queue.empty():
                    rank, result, error = pickle.loads(queue.get())
                    outcome[rank] = RankError(rank, *error) if error else result
                if time.monotonic() > end:
                    alive = [rank for rank, p in enumerate(processes) if p.is_alive()]
                    codes = [p.exitcode for p in processes]
                    _show_stacks(process.pid for process in processes if process.is_alive())
                    raise AssertionError(
                        f"ranks {alive} hang; exit codes: {codes}; outcome so far: {outcome}"
                    )
                time.sleep(0.02)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return outcome


def run(size: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:  # noqa: ANN401
    """Results of all ranks, by rank; raises the first error."""
    outcome = launch(size, function, *arguments, **options)
    for rank, result in enumerate(outcome):
        if isinstance(result, RankError):
            raise result
        assert result is not None, f"rank {rank} died or returned nothing"
    return outcome


def fail(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,  # noqa: ANN401
    **options: Any,  # noqa: ANN401
) -> list[RankError]:
    """Errors of all ranks, by rank; fails if one has none."""
    errors: list[RankError] = []
    for rank, result in enumerate(launch(size, function, *arguments, **options)):
        assert isinstance(result, RankError), f"rank {rank} did not fail: {result}"
        errors.append(result)
    return errors
