"""Sharded modules: what of them is compressed, and a line in the log that says why not.

FSDP gathers the weights at each forward, as many bytes as the gradients have: nothing is gained by
compressing the latter. Between replicas of shards (hybrid sharding) much is: there the shards are
exchanged in weights mode (`_replicas.py`), and gradients are compressed in modes ef and demo. Both
kinds of FSDP are met at the root module's first forward, when it is known which module is the root.
"""

from __future__ import annotations

import functools

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from torch_distro import _fsdp1, _fsdp2


def meet(module: nn.Module) -> None:
    """Meet the sharded modules in a module now, if their first forward is still to come.

    FSDP takes whom it meets first for a root: this is for what only roots are given to.
    """
    for part in module.modules():
        if isinstance(part, FullyShardedDataParallel):
            _fsdp1.meet(part)
        elif isinstance(part, FSDPModule):
            _fsdp2.meet(part)


@functools.cache
def install() -> None:
    """Wrap what must be wrapped, once a process. What this torch lacks is left alone."""
    _fsdp1.install()
    _fsdp2.install()
