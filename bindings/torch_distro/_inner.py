"""The backends of what stays exact.

Gloo, or the group's own transport (ADR 0016), on the CPU; NCCL or staging on a GPU (ADR 0013).
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from torch_distro._extension import extension

# Streams of collectives in a group's own transport: one for each backend below.
_WHOLE, _ORDERED, _SITE = range(3)


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
    ranks = range(handle.world_size)
    if handle.own_transport:
        return _transported(handle, options, _WHOLE, ranks)
    return _dispatch(store, handle, options, f"distro/{handle.round}", ranks, handle.own_devices)


def of_site(store: dist.Store, handle: Any, options: Any) -> Any:  # noqa: ANN401
    """The same for the ranks of this rank's site; None where that is this rank, or all ranks."""
    (ranks,) = (ranks for ranks in handle.sites if handle.rank in ranks)
    if len(ranks) in (1, handle.world_size):
        return None
    if handle.own_transport:
        return _transported(handle, options, _SITE, ranks)
    prefix = f"distro/{handle.round}/site/{ranks[0]}"
    return _dispatch(store, handle, options, prefix, ranks, handle.site_own_devices)


def of_reductions(store: dist.Store, handle: Any, options: Any) -> Any:  # noqa: ANN401
    """Another one of the whole group for the CPU: for what modes ef and demo find to be exact."""
    ranks = range(handle.world_size)
    if handle.own_transport:
        return _transport(handle, options, _ORDERED, ranks)
    prefix = f"distro/{handle.round}/reductions"
    return _gloo(dist.PrefixStore(prefix, store), handle, ranks, options._timeout)


def _transport(handle: Any, options: Any, stream: int, ranks: Sequence[int]) -> Any:  # noqa: ANN401
    return extension().TransportBackend(handle, options._timeout, stream, list(ranks))


def _transported(handle: Any, options: Any, stream: int, ranks: Sequence[int]) -> Any:  # noqa: ANN401
    """Never NCCL, which would connect the ranks in the clear."""
    return extension().DeviceDispatch(_transport(handle, options, stream, ranks))


def _dispatch(
    store: dist.Store,
    handle: Any,  # noqa: ANN401
    options: Any,  # noqa: ANN401
    prefix: str,
    ranks: Sequence[int],
    own_devices: bool,
) -> Any:  # noqa: ANN401
    """Of `ranks` of the group; `prefix` tells the keys in the store from those of others."""
    gloo = _gloo(dist.PrefixStore(f"{prefix}/gloo", store), handle, ranks, options._timeout)

    def nccl() -> Any:  # noqa: ANN401 - a type that torch exports only where it has NCCL
        return _nccl(dist.PrefixStore(f"{prefix}/nccl", store), handle, ranks, options)

    return extension().DeviceDispatch(gloo, nccl if own_devices else None)


def _nccl(store: dist.Store, handle: Any, ranks: Sequence[int], given: Any) -> Any:  # noqa: ANN401
    """Connects at its first collective."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = given._timeout
    world = given.global_ranks_in_group or range(handle.world_size)
    options.global_ranks_in_group = [world[rank] for rank in ranks]
    options.group_name = f"distro {handle.round} {ranks[0]}"  # type: ignore[assignment] # a str subtype
    if hasattr(options, "lazy_init"):  # torch 2.15
        options.lazy_init = True
    return dist.ProcessGroupNCCL(store, ranks.index(handle.rank), len(ranks), options)


def _gloo(
    store: dist.Store,
    handle: Any,  # noqa: ANN401
    ranks: Sequence[int],
    timeout: datetime.timedelta,
) -> dist.ProcessGroupGloo:
    """On the same address as the exchange."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = _gloo_devices(handle.bind_address or "127.0.0.1")
    options._threads = 2
    return dist.ProcessGroupGloo(store, ranks.index(handle.rank), len(ranks), options)


def _gloo_devices(address: str) -> list[Any]:  # of a type that torch does not export
    """On the interfaces of GLOO_SOCKET_IFNAME, as torch's own Gloo; else on the address."""
    make = dist.ProcessGroupGloo.create_device
    if chosen := os.environ.get("GLOO_SOCKET_IFNAME"):
        return [make(interface=interface) for interface in chosen.split(",")]
    if address in _interfaces():
        return [make(interface=address)]
    return [make(hostname=address)]


def _interfaces() -> set[str]:
    import socket

    return {name for _, name in socket.if_nameindex()}
