"""The distro backends inside torch's process groups."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from torch_distro._extension import extension


def backends_of(group: dist.ProcessGroup) -> list[Any]:
    """The distro backends of a process group, one for each device type that has one."""
    found: list[Any] = []
    for device in group._device_types:
        try:
            backend = group._get_backend(device)
        except RuntimeError:
            continue
        # TORCH_DISTRIBUTED_DEBUG=DETAIL puts a checking wrapper around every backend.
        backend = getattr(backend, "wrapped_pg", backend)
        if isinstance(backend, extension().ProcessGroupDistro) and not any(
            backend.group is other.group for other in found
        ):
            found.append(backend)
    return found
