"""What ties one wrapped module to the exchange, and what stats() shows of it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_distro._extension import extension
from torch_distro._groups import backends_of

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_ONE_RANK = "one rank"
_DENSE = "DISTRO_MODE=dense"
_ONE_SITE = "all ranks are one site (DISTRO_SITE): nothing to exchange"

# By group: a record of each module that it has had.
_records: weakref.WeakKeyDictionary[Any, list[dict[str, Any]]] = weakref.WeakKeyDictionary()


class Attachment:
    """What ties one DDP module to the exchange. Holds the module weakly.

    Args:
        module: the wrapper.
        copied: it is a copy or was unpickled, on some ranks perhaps only: it takes a number among
            the group's modules when it begins to train, which all ranks do together. A module that
            is wrapped takes its number at once.
    """

    def __init__(self, module: DistributedDataParallel, copied: bool) -> None:
        count = sum(parameter.numel() for _, parameter in trainable(module))
        self._begin(module.process_group, type(module.module).__name__)
        description = f"DDP, {count} trainable parameters, {len(self.group.sites)} participants"
        self._decide(_why_exact(module, self.group), description)
        if not copied:
            self.take_number(module)

    def _begin(self, process_group: Any, name: str) -> None:  # noqa: ANN401
        self.process_group = process_group
        self._backend = backends_of(process_group)[0]
        self.group = self._backend.group
        # What stats() shows; outlives the module.
        self.record: dict[str, Any] = {"name": name, "exchanges": 0}
        self.synchroniser: Any = None  # weights mode
        self.gradients: Any = None  # modes ef and demo
        self.names: list[str] = []
        self.shapes: list[torch.Size] = []
        self._hooked = False
        self._settled = False  # exact, and all ranks know
        self._normalises: list[bool] = []  # of the optimizers seen
        self._evaluated = False
        self._averaged_at = 0  # exchanges
        self._shows_reference = False

    def _decide(self, why_exact: str, description: str) -> None:
        if why_exact:
            self._go_exact(why_exact)
            return
        mode = self.group.mode if self.group.exchanges_gradients else "weights"
        self._note(mode, description)
        self.group.log("info", f"module {self.name}: {mode} mode ({description})")

    @property
    def name(self) -> str:
        return self.record["name"]

    @property
    def exchanged(self) -> bool:
        """Whether the module is in weights mode, and has a number."""
        return self.record["mode"] == "weights" and self.synchroniser is not None

    def _note(self, mode: str, reason: str) -> None:
        self.record.update(mode=mode, reason=reason)

    def _go_exact(self, reason: str) -> None:
        self._note("exact", reason)
        self._settled = reason in (_ONE_RANK, _DENSE, _ONE_SITE)  # which all ranks have in common
        level = "info" if self._settled else "warning"
        self.group.log(level, f"module {self.name}: exact, nothing is compressed ({reason})")
        self.gradients = None
        self._backend.stop_recognising(f"module {self.name}: {reason}")

    def _parameters(self, module: Any) -> list[tuple[str, torch.Tensor]]:  # noqa: ANN401
        """What is exchanged, by name."""
        return list(trainable(module))

    def _frozen(self, module: Any) -> list[tuple[str, torch.Tensor]]:  # noqa: ANN401
        """What would be, were it trained."""
        return list(_frozen(module))

    def take_number(self, module: Any) -> None:  # noqa: ANN401 - the wrapper, of whatever kind
        """Become one of the group's modules; the order is the same on all ranks. Idempotent."""
        if self.synchroniser is not None or self.gradients is not None:
            return
        records = _records.setdefault(self.group, [])
        if not any(record is self.record for record in records):
            records.append(self.record)
        if self._settled:
            return
        exact = self.record["mode"] == "exact"
        named = [] if exact else self._parameters(module)
        self.names = [name for name, _ in named]
        self.shapes = [parameter.shape for _, parameter in named]
        parameters = [parameter for _, parameter in named]
        core = extension()
        if self.group.exchanges_gradients:
            # Ranks agree on each reduction, not on the module.
            if not exact:
                self.gradients = core.ModuleGradients(self._backend, parameters, self.names)
            return
        self.synchroniser = core.ModuleSynchroniser(self._backend, parameters, self.names)
        if exact:
            self.synchroniser.stay_exact(self.record["reason"])
            return
        frozen = self._frozen(module)
        self.synchroniser.watch_frozen([p for _, p in frozen], [name for name, _ in frozen])
        for normalises in self._normalises:
            self.synchroniser.set_optimizer(normalises)

    def leave(self, reason: str) -> None:
        """Reduce gradients exactly, from the next training forward on, as all ranks must."""
        if self.record["mode"] == "weights":
            self._go_exact(reason)
            if self.synchroniser is not None:
                self.synchroniser.stay_exact(reason)

    def take_optimizer(self, normalises: bool) -> None:
        """An optimizer stepped these parameters; whether its steps do not scale with gradients."""
        self._normalises.append(normalises)
        if self.synchroniser is not None:
            self.synchroniser.set_optimizer(normalises)

    def before_forward(self, module: DistributedDataParallel) -> None:
        """The sync point, under DDP's own condition; with join() it comes a little later."""
        ready = torch.is_grad_enabled() and module.require_backward_grad_sync
        if ready and not module._join_config.enable:
            self.sync(module)
        elif not torch.is_grad_enabled():
            self._note_evaluation()

    def sync(self, module: DistributedDataParallel, joined: bool | None = None) -> None:
        """Exchange the module, or agree that it stays exact. Collective in weights mode.

        Args:
            module: the wrapper.
            joined: under join(), whether this rank has run out of data.
        """
        if self._settled:
            return
        self.take_number(module)
        if self.group.exchanges_gradients:
            if self.gradients is not None and not self._hooked:
                extension().ModuleGradients.attach(self.gradients, module.reducer)
                self._hooked = True
            return
        if self.exchanged and not self._hooked:
            extension().ModuleSynchroniser.attach(self.synchroniser, module.reducer)
            self._hooked = True
        self.synchroniser.take_site(joined)
        self._exchange()

    def _note_evaluation(self) -> None:
        """Say once, on one rank, what an evaluation of these weights shows."""
        if self._evaluated or not self.exchanged or self.group.rank != 0 or self._shows_reference:
            return
        if self.synchroniser.exchanges == self._averaged_at:
            return
        self._evaluated = True
        self.group.log(
            "warning",
            f"module {self.name}: an evaluation sees this rank's own weights, with what it has not "
            "sent yet. Before the last one and the save call torch_distro.average(module) on all "
            "ranks; `with torch_distro.reference(module):` shows the weights that all ranks have "
            "in common, on any rank and without communication.",
        )

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The parameters are W."""
        self.settle()
        self.synchroniser.show_reference()
        self._shows_reference = True
        try:
            yield
        finally:
            self._shows_reference = False
            self.settle()
            self.synchroniser.hide_reference()

    def settle(self) -> None:
        """Before the weights are read or written outside the exchange."""

    def before_save(self) -> None:
        """Before torch.distributed.checkpoint writes something, perhaps this module."""

    def _exchange(self) -> None:
        self.synchroniser.before_forward()
        self._settled = self.synchroniser.exact
        self.record["exchanges"] = self.synchroniser.exchanges

    def average(self) -> bool:
        """The mean by the exchange, if the module is or was exchanged. Collective."""
        if self.synchroniser is not None and (self.exchanged or self._hooked):
            self.synchroniser.average()
            self._averaged_at = self.synchroniser.exchanges
            return True
        return False

    def take_script_hook(self) -> None:
        """The script registers a communication hook of its own: step aside.

        Raises:
            RuntimeError: too late, the module has begun to train.
        """
        if self._hooked:
            raise RuntimeError(
                "torch_distro: register a communication hook before the first training forward "
                "(after it the module's gradients are exchanged by the distro backend)"
            )
        reason = "the script has a communication hook of its own"
        if self.group.exchanges_gradients and self.record["mode"] != "exact":
            self._go_exact(reason)
        self.leave(reason)


def trainable(module: DistributedDataParallel) -> list[tuple[str, nn.Parameter]]:
    """The parameters that DDP reduces: trainable, each once (tied ones by their first name)."""
    return [(name, parameter) for name, parameter in _shared(module) if parameter.requires_grad]


def _frozen(module: DistributedDataParallel) -> list[tuple[str, nn.Parameter]]:
    """Those that DDP would reduce if they were trained."""
    return [(name, parameter) for name, parameter in _shared(module) if not parameter.requires_grad]


def _shared(module: DistributedDataParallel) -> list[tuple[str, nn.Parameter]]:
    ignored: set[str] = getattr(module, "parameters_to_ignore", set())
    named = module.module.named_parameters()
    return [(name, parameter) for name, parameter in named if name not in ignored]


def _why_exact(module: DistributedDataParallel, group: Any) -> str:  # noqa: ANN401
    """Why this module cannot be exchanged; empty if it can."""
    if group.world_size == 1:
        return _ONE_RANK
    if group.mode == "dense":
        return _DENSE
    if len(group.sites) == 1:
        return _ONE_SITE
    if getattr(module, "mixed_precision", None) is not None:
        return "DDP's own mixed_precision swaps the weights; use torch.autocast instead"
    if getattr(module, "_delay_all_reduce_params", None):
        return "delay_all_reduce_named_params"
    if getattr(module, "_use_python_reducer", False):
        return "the Python reducer of compiled autograd"
    named = trainable(module)
    for name, parameter in named:
        if hasattr(parameter, "_in_backward_optimizers"):
            return f"the optimizer of {name} steps inside backward"
        if group.exchanges_gradients and parameter.device.type != "cpu":
            return f"parameter {name} is on {parameter.device}, and mode {group.mode} is of the CPU"
        if parameter.device.type not in ("cpu", "cuda"):
            return f"parameter {name} is on {parameter.device}: neither the CPU nor CUDA"
        if parameter.device != named[0][1].device:
            return f"{named[0][0]} is on {named[0][1].device} and {name} on {parameter.device}"
        if parameter.dtype not in _FLOATS or parameter.layout != torch.strided:
            return f"parameter {name} is {parameter.dtype}, {parameter.layout}"
    return ""


def add_record(group: Any, name: str, mode: str, reason: str) -> None:  # noqa: ANN401
    """Have stats() show a module that is not attached."""
    record = {"name": name, "exchanges": 0, "mode": mode, "reason": reason}
    _records.setdefault(group, []).append(record)


def records_of(group: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """The modules that a group has had, with the mode each got and why."""
    return [dict(record) for record in _records.get(group, [])]
