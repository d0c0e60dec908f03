"""The backends of what stays exact: Gloo on the CPU, NCCL or staging on a GPU (ADR 0013)."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist

from torch_distro._extension import extension


def devices() -> list[str]:
    """Names of the GPUs that NCCL may use in this process, unique on the host; none without NCCL.

    Asks the driver's management library where there is one, so that no CUDA context is made and the
    process may still fork.
    """
    if not dist.is_nccl_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible is not None else map(str, range(1024))
    return [name.strip() for name, _ in zip(names, range(torch.cuda.device_count()), strict=False)]


def make(store: dist.Store, handle: Any, options: Any) -> Any:  # noqa: ANN401 - the extension's
    """The inner backend of one process group, for tensors of any device.

    Args:
        store: the group's own.
        handle: the extension's Group, whose ranks have met.
        options: the extension's BackendOptions.
    """
    prefix = f"distro/{handle.round}"
    gloo = gloo_of(store, "gloo", handle, options._timeout)

    def nccl() -> Any:  # noqa: ANN401 - a type that torch exports only where it has NCCL
        return _nccl(dist.PrefixStore(f"{prefix}/nccl", store), handle, options)

    return extension().DeviceDispatch(gloo, nccl if handle.own_devices else None)


def _nccl(store: dist.Store, handle: Any, given: Any) -> Any:  # noqa: ANN401
    """Connects at its first collective."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = given._timeout
    options.global_ranks_in_group = given.global_ranks_in_group
    options.group_name = f"distro {handle.round}"  # type: ignore[assignment] # a str subtype
    if hasattr(options, "lazy_init"):  # torch 2.15
        options.lazy_init = True
    return dist.ProcessGroupNCCL(store, handle.rank, handle.world_size, options)


def gloo_of(
    store: dist.Store,
    name: str,
    handle: Any,  # noqa: ANN401
    timeout: datetime.timedelta,
) -> dist.ProcessGroupGloo:
    """A Gloo on the same address as the exchange; `name` tells it from the group's others."""
    store = dist.PrefixStore(f"distro/{handle.round}/{name}", store)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [_gloo_device(handle.bind_address or "127.0.0.1")]
    options._threads = 2
    return dist.ProcessGroupGloo(store, handle.rank, handle.world_size, options)


def _gloo_device(address: str) -> Any:  # noqa: ANN401 - a type that torch does not export
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return dist.ProcessGroupGloo.create_default_device()
    if address in _interfaces():
        return dist.ProcessGroupGloo.create_device(interface=address)
    return dist.ProcessGroupGloo.create_device(hostname=address)


def _interfaces() -> set[str]:
    import socket

    return {name for _, name in socket.if_nameindex()}
