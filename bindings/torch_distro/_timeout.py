"""A group's time-out, where torch changes it for its own backends only."""

from __future__ import annotations

import datetime
import functools

import torch.distributed as dist
from torch.distributed import distributed_c10d

from torch_distro._groups import backends_of


@functools.cache
def install() -> None:
    """Have ``_set_pg_timeout`` of torch before 2.15, which frameworks call, reach distro groups.

    Once a process. Newer torch asks every backend.
    """
    if hasattr(dist, "set_timeout"):
        return
    original = distributed_c10d._set_pg_timeout

    @functools.wraps(original)
    def set_timeout(timeout: datetime.timedelta, group: dist.ProcessGroup | None = None) -> None:
        chosen = dist.group.WORLD if group is None else group
        if isinstance(chosen, dist.ProcessGroup) and backends_of(chosen):
            chosen.set_timeout(timeout)
        else:
            original(timeout, group)

    distributed_c10d._set_pg_timeout = set_timeout
