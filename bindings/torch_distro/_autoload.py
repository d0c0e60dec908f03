"""What torch's entry points call. Imports no torch at its top: torch is still loading then."""

from __future__ import annotations

import warnings


def autoload() -> None:
    """Register the backend at the end of ``import torch``.

    Whatever fails is a warning, never an error.
    """
    try:
        register()
    except Exception as error:
        warnings.warn(f"torch-distro is installed but cannot be used: {error}", stacklevel=2)


def register() -> None:
    """Register the backend; torch calls this when ``distro`` is asked for by name. Idempotent."""
    from torch_distro import _backend

    _backend.register()
