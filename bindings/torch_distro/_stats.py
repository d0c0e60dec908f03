"""Counters of the groups of this process, and the file of DISTRO_STATS."""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from torch_distro._attach import modules_of
from torch_distro._extension import extension
from torch_distro._groups import backends_of

# Every group that is open, or whose counters are to be written at exit; the one list of this
# package's groups.
_groups: list[Any] = []
_owner = os.getpid()


def add(group: Any) -> None:  # noqa: ANN401 - the extension's Group
    """Note a new group: it is closed at exit if the script does not, and its counters written."""
    _groups[:] = [other for other in _groups if not other.closed or other.stats_path]
    _groups.append(group)


def stats(group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Counters of this rank in a group since the group was made.

    Args:
        group: a process group of the distro backend; the default group if not given.

    Returns:
        A dict of plain numbers and text. Bytes: ``gradient_bytes`` (what dense training would have
        reduced, in the gradients' dtype), ``payload_bytes_sent`` / ``received`` (records, once for
        each receiver of another participant), ``socket_bytes_sent`` / ``received`` (all that
        ZeroMQ was given and gave), ``exact_bytes`` (handed to the inner backend), ``site_bytes``
        (handed to the other ranks of this rank's site: gradients, and records that are passed on;
        no part of payload and exact bytes). Counts: ``exchanges``, ``reductions``, ``exact``,
        ``resent_frames``, ``reconnects``, ``resyncs``, ``participants``, ``rejected_frames``
        (malformed, or of strangers), ``rejected_connections`` (ended before they had brought a
        frame, and own ones that a peer's handshake refused). Seconds:
        ``encode_seconds``, ``decode_seconds``, ``wait_seconds``. ``reference_checksum``: of the
        reference weights (modes ``ef`` and ``demo``: of the last decoded gradients), equal on all
        ranks; a sum over the modules. ``modules``: a list of dicts with ``name``, ``mode`` and
        ``reason``.

    Raises:
        ValueError: the group has no distro backend.
    """
    if group is None:
        group = dist.group.WORLD
    backends = backends_of(group) if group is not None else []
    if not backends:
        raise ValueError("this process group has no distro backend (is it initialised?)")
    return _snapshot(backends[0].group)


def _snapshot(group: Any) -> dict[str, Any]:  # noqa: ANN401
    return {**group.stats(), "modules": modules_of(group)}


def _path_of(path: str, rank: int) -> Path:
    """``stats.json`` of rank 2 is ``stats.rank2.json``."""
    given = Path(path)
    return given.with_name(f"{given.stem}.rank{rank}{given.suffix or '.json'}")


def write() -> None:
    """Write the counters of each group that asked for it (DISTRO_STATS).

    One file a rank of its first group. The first group's counters are at the top; those of further
    groups are a list under ``groups``.
    """
    snapshots = [(group.stats_path, _snapshot(group)) for group in _groups if group.stats_path]
    for path in {path for path, _ in snapshots}:
        first, *others = [snapshot for other, snapshot in snapshots if other == path]
        target = _path_of(path, first["rank"])
        text = json.dumps({**first, "groups": others}, indent=2) + "\n"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        except OSError as error:  # it could be written to when the group was made
            print(
                f"torch-distro: the counters of rank {first['rank']} (DISTRO_STATS) cannot be "
                f"written to {target}: {error.strerror or error}. They are:\n{text}",
                file=sys.stderr,
            )


@atexit.register
def _at_exit() -> None:
    if os.getpid() != _owner:
        return  # a forked DataLoader worker: the sockets are its parent's
    if not _groups:
        return
    extension().begin_interpreter_end()
    reason = _failure()
    for group in _groups:
        if reason:
            group.leave(f"rank {group.rank} {reason}")
        else:
            group.close()
    write()


def _failure() -> str:
    """What ended the script, if it was an uncaught exception."""
    if not hasattr(sys, "last_value"):  # set where the interpreter prints the traceback
        return ""
    error = sys.last_value
    return f"ended because of an exception: {type(error).__name__}: {error}; see its own output"
