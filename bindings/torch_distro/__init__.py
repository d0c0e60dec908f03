"""DisTrO's compressed exchange as a backend of torch.distributed.

``torch.distributed.init_process_group("distro")`` needs no import of this package: torch finds the
backend by its entry points. Import it for what goes beyond: :func:`average` before the last
evaluation, :func:`reference`, :func:`stats`, :class:`Options` for ``pg_options``, :func:`resync`
after editing weights.

Importing the package imports no torch, so that torch can load it while torch itself is loading.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_distro._modules import average as average
    from torch_distro._modules import load_state_dict as load_state_dict
    from torch_distro._modules import reference as reference
    from torch_distro._modules import resync as resync
    from torch_distro._modules import state_dict as state_dict
    from torch_distro._options import Options as Options
    from torch_distro._stats import stats as stats

__version__ = "0.1.0"

__all__ = [
    "Options",
    "__version__",
    "average",
    "load_state_dict",
    "reference",
    "resync",
    "state_dict",
    "stats",
]

_HOMES = {
    "Options": "torch_distro._options",
    "average": "torch_distro._modules",
    "load_state_dict": "torch_distro._modules",
    "reference": "torch_distro._modules",
    "resync": "torch_distro._modules",
    "state_dict": "torch_distro._modules",
    "stats": "torch_distro._stats",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'torch_distro' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
