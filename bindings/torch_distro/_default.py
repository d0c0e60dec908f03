"""DISTRO_DEFAULT=1: scripts that name no backend, or NVIDIA's, get distro.

Every name of a backend passes through ``torch.distributed.Backend(name)``: in
``init_process_group`` (where none becomes "undefined"), in ``new_group``, and for each part of a
string such as "cuda:nccl". It is a class, so that what is put in its place works whatever was
imported before.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist

from torch_distro._extension import AdapterError, extension

VARIABLE = "DISTRO_DEFAULT"
# Besides no name at all: what names the default of torch rather than a choice of the script's.
_REPLACED = frozenset({"undefined", "nccl", "cpu:gloo,cuda:nccl", "cuda:nccl,cpu:gloo"})


def install(name: str) -> None:
    """Make `name` the backend of scripts that name none, or nccl, if DISTRO_DEFAULT=1. Idempotent.

    A script that never makes a process group notices nothing. Where the extension cannot be loaded
    torch's defaults stay, with a warning. Another value than 0 or 1 is an error when the group is
    made, not here, in the middle of ``import torch``.
    """
    value = os.environ.get(VARIABLE, "0")
    if value == "0" or getattr(dist.Backend.__new__, "distro", False):
        return
    if value == "1":
        try:
            extension()
        except AdapterError as error:
            message = f"{VARIABLE}=1 has no effect, torch's own backends are used: {error}"
            warnings.warn(message, stacklevel=2)
            return
        devices = dist.Backend.backend_capability[name]
        # What get_default_backend_for_device and init_process_group(device_id=...) look at.
        dist.Backend.default_device_backend_map.update(dict.fromkeys(devices, name))
    original = dist.Backend.__new__

    @functools.wraps(original)
    def backend(cls: type, given: Any) -> Any:  # noqa: ANN401 - torch's own answer
        if not isinstance(given, str) or given.lower() not in _REPLACED:
            return original(cls, given)
        if value != "1":
            raise ValueError(f"{VARIABLE}={value} is not allowed. Allowed: 0, 1.")
        return original(cls, name)

    backend.distro = True  # type: ignore[attr-defined]
    dist.Backend.__new__ = staticmethod(backend)  # type: ignore[method-assign,assignment]


def is_foreign_options(pg_options: object) -> bool:
    """Whether a script's ``pg_options`` belong to the backend that distro stands in for."""
    return os.environ.get(VARIABLE) == "1" and isinstance(
        pg_options, torch._C._distributed_c10d.Backend.Options
    )
