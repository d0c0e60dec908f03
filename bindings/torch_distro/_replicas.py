"""Weights mode between the replicas of a sharded module: hybrid sharding (HSDP) of FSDP1 and FSDP2.

The ranks that hold the same shard are a group. FSDP all-reduces the shard's gradient over it inside
backward, which is handed back untouched (`hand_replicas_to`), and the shards are exchanged at the
root module's training forward, before FSDP gathers them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from torch_distro._attach import add_owner
from torch_distro._attachment import _FLOATS, Attachment

# Where FSDP reduces: FSDP1's handles and FSDP2's groups of parameters.
_reducers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Shard:
    """What this rank has of a parameter: its name, its memory, whether it is trained."""

    name: str
    memory: torch.Tensor
    trained: bool


class Replicas(Attachment):
    """What ties the shards of one root module to the exchange.

    Args:
        module: the root.
        name: of the module, as ``stats()`` shows it.
        group: the ranks that hold the same shards.
        find_shards: this rank's, as they are now; the same parameters in the same order each time.
        reducers: what FSDP reduces their gradients by.
        reshard: lets go of weights that were gathered from the shards.
        why_exact: they cannot be exchanged; empty if they can.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        group: dist.ProcessGroup,
        find_shards: Callable[[], list[Shard]],
        reducers: list[Any],
        reshard: Callable[[], None],
        why_exact: str,
    ) -> None:
        self._find_shards = find_shards
        self._reshard = reshard
        self._trained_in_backward: list[bool] | None = None
        self._alike = True  # the replicas have not been trained since they had one mean
        self._warned = False
        self._begin(group, name)
        self._take_shards([shard.trained for shard in find_shards()])
        count = sum(shard.numel() for _, shard in self._shards)
        description = (
            f"hybrid sharding, {count} trainable parameters in this rank's shard, "
            f"{self.group.world_size} replicas"
        )
        self._decide(why_exact or _why_not(self._shards), description)
        self.take_number(None)
        self._hooked = True
        add_owner(module, self, module.parameters())
        for reducer in reducers:
            _reducers[reducer] = self

    def _parameters(self, module: Any) -> list[tuple[str, torch.Tensor]]:  # noqa: ANN401
        return self._shards

    def _frozen(self, module: Any) -> list[tuple[str, torch.Tensor]]:  # noqa: ANN401
        return []

    def _take_shards(self, trained: list[bool]) -> None:
        """Exchange these of the shards."""
        self._trained = trained
        # An alias: FSDP may put a shard into other memory, and the exchange follows it.
        self._shards = [
            (shard.name, shard.memory.detach())
            for shard, taken in zip(self._find_shards(), trained, strict=True)
            if taken and shard.memory.numel() > 0
        ]

    def settle(self) -> None:
        """Nothing is gathered, and the exchange knows where the shards lie now."""
        self._reshard()
        memory = {shard.name: shard.memory for shard in self._find_shards()}
        for name, shard in self._shards:
            if shard.data_ptr() != memory[name].data_ptr():
                shard.data = memory[name].detach()

    def exchange(self) -> None:
        """The sync point. Collective over the replicas."""
        if self._settled:
            return
        self.settle()
        trained, self._trained_in_backward = self._trained_in_backward, None
        if self.exchanged and trained is not None and trained != self._trained:
            self._begin_again(trained)
        self._exchange()

    def _begin_again(self, trained: list[bool]) -> None:
        """The script has frozen or thawed parameters, on all ranks."""
        self.group.log(
            "info",
            f"module {self.name}: parameters were frozen, or are trained now that were frozen; all "
            "replicas take the mean of their weights once",
        )
        self.synchroniser.average()  # what is frozen now
        self.synchroniser = None
        self._take_shards(trained)
        self.take_number(None)
        self.synchroniser.average()  # what was frozen: each replica has trained its own for a step

    def average(self) -> bool:
        self.settle()
        self._alike = super().average()
        return self._alike

    def before_save(self) -> None:
        """torch.distributed.checkpoint takes each shard from one of its replicas."""
        if self.exchanged and not self._alike and not self._warned and dist.get_rank() == 0:
            self._warned = True
            self.group.log(
                "warning",
                f"module {self.name}: its replicas' weights differ a little, and a checkpoint "
                "takes some shards from one replica and some from another. Call "
                "torch_distro.average(module) on all ranks before a save",
            )

    @contextlib.contextmanager
    def reducing(self) -> Iterator[None]:
        """All-reduces over the replicas are this module's gradients."""
        self._alike = False
        self._backend.hand_replicas_to(self.synchroniser)
        try:
            yield
        finally:
            self._backend.hand_replicas_to(None)
        # Here and not in the forward: a script may freeze a module for another one's backward.
        if self._trained_in_backward is None and self.synchroniser.backward_done:
            self._trained_in_backward = [shard.trained for shard in self._find_shards()]


def _why_not(shards: list[tuple[str, torch.Tensor]]) -> str:
    for name, shard in shards:
        if shard.device.type not in ("cpu", "cuda"):
            return f"the shard of {name} is on {shard.device}: neither the CPU nor CUDA"
        if shard.device != shards[0][1].device:
            return f"{shards[0][0]} is on {shards[0][1].device} and {name} on {shard.device}"
        if shard.dtype not in _FLOATS or not shard.is_contiguous():
            return f"the shard of {name} is {shard.dtype}, {shard.layout}"
        if type(shard) is not torch.Tensor:
            return f"the shard of {name} is a {type(shard).__name__}"
    return ""


@contextlib.contextmanager
def reducing_of(reducer: Any) -> Iterator[None]:  # noqa: ANN401 - types of FSDP
    """Around FSDP's reduction of what `reducer` holds."""
    replicas = _reducers.get(reducer)
    if replicas is None or replicas.synchroniser is None:
        yield
        return
    with replicas.reducing():
        yield
