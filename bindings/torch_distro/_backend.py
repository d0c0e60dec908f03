"""Registration of the backend, and the function that makes one."""

from __future__ import annotations

import datetime
import os
import warnings
from typing import Any

import torch.distributed as dist

from torch_distro._extension import AdapterError, adapter_name, extension
from torch_distro._options import Options

NAME = "distro"


def register() -> None:
    """Make ``distro`` known to torch.distributed. Idempotent.

    Warns, once, when the package was not built for this torch; the backend is registered even so,
    and ``init_process_group("distro")`` then raises the same message as an error.
    """
    if not dist.is_available() or NAME.upper() in dist.Backend._plugins:
        return
    dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])
    try:
        adapter_name()
    except AdapterError as error:
        warnings.warn(f"{error}. Until then init_process_group('distro') fails.", stacklevel=2)


def create(group: Any, pg_options: object = None) -> Any:  # noqa: ANN401 - torch's own untyped interface
    """Make the backend of one process group (torch calls this).

    Args:
        group: torch's DistributedBackendOptions: store, group_rank, group_size, timeout.
        pg_options: an :class:`Options`, or nothing.

    Raises:
        AdapterError: the package was not built for this torch.
        ValueError: a bad option or DISTRO_ variable.
        torch.distributed.DistBackendError: the ranks do not agree, or one of them does not come.
    """
    core = extension()
    if pg_options is not None and not isinstance(pg_options, Options):
        raise TypeError(
            "pg_options of the distro backend is a torch_distro.Options, "
            f"not a {type(pg_options).__name__}"
        )
    options = core.BackendOptions(
        group.timeout,
        pg_options.overrides() if pg_options else {},
        group.global_ranks_in_group,
    )
    return make(group.store, group.group_rank, group.group_size, options)


def make(store: dist.Store, rank: int, size: int, options: Any) -> Any:  # noqa: ANN401 - the extension's
    """Make the backend of a group that torch was asked for, or that is split off another.

    Args:
        store: no other group uses its keys.
        rank: this rank in the group.
        size: ranks of the group.
        options: the extension's BackendOptions.

    Raises:
        ValueError, torch.distributed.DistBackendError: as :func:`create`.
    """
    core = extension()
    from torch_distro import _attach, _stats

    timeout = options._timeout
    handle = core.join(store, rank, size, timeout, options.overrides)
    try:
        meeting = dist.PrefixStore(f"distro/{handle.round}/gloo", store)
        try:
            inner = _gloo(meeting, handle, timeout)
        except RuntimeError as error:
            handle.fail("init_process_group", str(error))
        backend = core.ProcessGroupDistro(handle, inner, options)
    except BaseException:
        handle.close()
        raise
    _stats.add(handle)
    _attach.install()
    return backend


def _gloo(store: dist.Store, handle: Any, timeout: datetime.timedelta) -> dist.ProcessGroupGloo:  # noqa: ANN401
    """The backend of what stays exact, on the same address as the exchange."""
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
