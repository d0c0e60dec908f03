"""Registration of the backend, and the function that makes one."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch.distributed as dist

from torch_distro import _barrier, _default
from torch_distro._extension import AdapterError, adapter_name, extension
from torch_distro._groups import backends_of
from torch_distro._options import Options

NAME = "distro"

# functools.cache runs a function twice where two threads, each a rank, make their first groups.
_installing = threading.Lock()


def register() -> None:
    """Make ``distro`` known to torch.distributed, and the default if DISTRO_DEFAULT=1. Idempotent.

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
    _barrier.install(NAME)
    _default.install(NAME)


def create(group: Any, pg_options: object = None) -> Any:  # noqa: ANN401 - torch's own untyped interface
    """Make the backend of one process group (torch calls this).

    Args:
        group: torch's DistributedBackendOptions: store, group_rank, group_size, timeout.
        pg_options: an :class:`Options`, or nothing: those of the default group, if there is one.

    Raises:
        AdapterError: the package was not built for this torch.
        ValueError: a bad option or DISTRO_ variable.
        torch.distributed.DistBackendError: the ranks do not agree, or one of them does not come.
    """
    core = extension()
    if _default.is_foreign_options(pg_options):
        kind = type(pg_options).__qualname__
        warnings.warn(f"the distro backend ignores pg_options of type {kind}", stacklevel=2)
        pg_options = None
    if pg_options is not None and not isinstance(pg_options, Options):
        raise TypeError(
            "pg_options of the distro backend is a torch_distro.Options, "
            f"not a {type(pg_options).__name__}"
        )
    options = core.BackendOptions(
        group.timeout,
        pg_options.overrides() if pg_options else _default_overrides(),
        group.global_ranks_in_group,
    )
    return make(group.store, group.group_rank, group.group_size, options)


def _default_overrides() -> dict[str, str]:
    """Of the default group: scripts give options once, and meshes make groups without any."""
    world = dist.group.WORLD
    backends = backends_of(world) if world is not None else []
    return dict(backends[0].options.overrides) if backends else {}


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
    from torch_distro import _attach, _inner, _sharded, _site_mesh, _stats, _timeout

    handle = core.join(
        store,
        rank,
        size,
        options._timeout,
        options.overrides,
        _inner.devices(),
        options.global_ranks_in_group,
    )
    try:
        try:
            inner, ordered = _inner.make(store, handle, options), None
            site = _inner.of_site(store, handle, options)
            if handle.exchanges_gradients:
                ordered = _inner.of_reductions(store, handle, options)
        except RuntimeError as error:
            handle.fail("init_process_group", str(error))
        backend = core.ProcessGroupDistro(handle, inner, ordered, site, options)
    except BaseException as error:
        handle.leave(f"rank {rank} could not make its backend: {error}")
        raise
    _stats.add(handle)
    with _installing:
        _attach.install()
        _sharded.install()
        _site_mesh.install()
        _timeout.install()
    return backend
