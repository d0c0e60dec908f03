"""The compiled adapter: one a torch minor, since c10d's C++ interface changes with each."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

SUPPORTED = ((2, 11), (2, 15))
"""Least and newest torch minor."""


class AdapterError(ImportError):
    """There is no adapter for the torch of this environment. The message names the fix."""


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def adapter_name() -> str:
    """Name of the adapter for the installed torch.

    Raises:
        AdapterError: torch is missing, not supported, or another minor than this package was built
            for.
    """
    try:
        import torch
    except ImportError as error:
        raise AdapterError(
            "torch-distro needs torch: pip install 'torch>=2.11,<2.16', then reinstall torch-distro"
        ) from error
    minor = _minor(torch.__version__)
    if not SUPPORTED[0] <= minor <= SUPPORTED[1]:
        raise AdapterError(
            f"torch-distro supports torch 2.11 to 2.15, and this is torch {torch.__version__}: "
            "pip install 'torch>=2.11,<2.16', then reinstall torch-distro"
        )
    name = f"_c10d_{minor[0]}_{minor[1]}"
    folder = Path(__file__).parent
    built = sorted(path.stem for path in folder.glob("_c10d_*.so"))
    if name not in built:
        versions = ", ".join(stem.removeprefix("_c10d_").replace("_", ".") for stem in built)
        raise AdapterError(
            f"torch-distro was built for torch {versions or '(none)'}, and this is torch "
            f"{torch.__version__}: reinstall torch-distro from its sources in this environment "
            "(pip install --force-reinstall --no-deps .)"
        )
    return name


@functools.cache
def extension() -> ModuleType:
    """The adapter, loaded.

    Raises:
        AdapterError: as :func:`adapter_name`, or the shared library cannot be loaded.
    """
    name = adapter_name()
    try:
        return importlib.import_module(f"torch_distro.{name}")
    except ImportError as error:
        raise AdapterError(
            f"the adapter {name} of torch-distro cannot be loaded ({error}): install its libraries "
            "(Debian: libzmq5 libsodium23 libtbb12 libxxhash0 libfmt9 libspdlog1.10), or reinstall "
            "torch-distro"
        ) from error
