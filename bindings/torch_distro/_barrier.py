"""``dist.monitored_barrier`` on torches that let only gloo through, by its name.

The method of the process group that it calls is there on all of them.
"""

from __future__ import annotations

import datetime
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from torch_distro._extension import AdapterError, _minor
from torch_distro._groups import backends_of

# From here on it asks for any backend of the CPU.
_OPEN_SINCE = (2, 15)


def install(name: str) -> None:
    """Let groups of the backend `name` through, if this torch does not. Idempotent."""
    original = dist.monitored_barrier
    if _minor(torch.__version__) >= _OPEN_SINCE or getattr(original, "distro", False):
        return

    @functools.wraps(original)
    def monitored_barrier(
        group: dist.ProcessGroup | None = None,
        timeout: datetime.timedelta | float | None = None,
        wait_all_ranks: bool = False,
    ) -> None:
        member = group is not dist.GroupMember.NON_GROUP_MEMBER
        chosen = (group or dist.group.WORLD) if member else None
        if chosen is None or dist.get_backend(chosen) != name or not _on_cpu(chosen):
            return original(group, timeout, wait_all_ranks)
        if timeout is None:
            timeout = distributed_c10d._get_default_timeout(dist.get_backend(chosen))
        elif isinstance(timeout, float):
            timeout = datetime.timedelta(seconds=timeout)
        distributed_c10d._check_valid_timeout(timeout)
        backend: Any = chosen
        return backend.monitored_barrier(timeout, wait_all_ranks=wait_all_ranks)

    monitored_barrier.distro = True  # type: ignore[attr-defined]
    dist.monitored_barrier = monitored_barrier
    distributed_c10d.monitored_barrier = monitored_barrier


def _on_cpu(group: dist.ProcessGroup) -> bool:
    try:
        return bool(backends_of(group)) and torch.device("cpu") in group._device_types
    except AdapterError:
        return False
