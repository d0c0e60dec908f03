"""How wrapped modules of an unchanged script are found and kept in step.

When the first distro group is made, ``DistributedDataParallel.__init__`` is wrapped (a class
attribute, so that it works whatever the script imported before). Each DDP module on a distro group
then gets a forward-pre hook, the one place where it is exchanged, and a communication hook that
hands its gradient buckets back as they are. In modes ``ef`` and ``demo`` the communication hook is
what exchanges, and the forward-pre hook only registers it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_distro._extension import extension
from torch_distro._groups import backends_of

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_ONE_RANK = "one rank"
_DENSE = "DISTRO_MODE=dense"
# Their steps scale with the gradient, so that the mean of the ranks' steps is the step on the mean
# gradient. All others normalise in some way.
_LINEAR = (torch.optim.SGD, torch.optim.ASGD)


class Attachment:
    """What ties one DDP module to the exchange. Holds the module weakly.

    Args:
        module: the wrapper.
        copied: it is a copy or was unpickled, on some ranks perhaps only: it takes a number among
            the group's modules when it begins to train, which all ranks do together. A module that
            is wrapped takes its number at once.
    """

    def __init__(self, module: DistributedDataParallel, copied: bool) -> None:
        self.process_group = module.process_group
        self._backend = backends_of(self.process_group)[0]
        self.group = self._backend.group
        # What stats() shows; outlives the module.
        self.record: dict[str, Any] = {"name": type(module.module).__name__, "exchanges": 0}
        self.synchroniser: Any = None  # weights mode
        self.gradients: Any = None  # modes ef and demo
        self.names: list[str] = []
        self.shapes: list[torch.Size] = []
        self._hooked = False
        self._settled = False  # exact, and all ranks know
        self._normalises: list[bool] = []  # of the optimizers seen before there was a synchroniser
        if reason := _why_exact(module, self.group):
            self._go_exact(reason)
        else:
            mode = self.group.mode if self.group.exchanges_gradients else "weights"
            count = sum(parameter.numel() for _, parameter in trainable(module))
            self._note(mode, f"DDP, {count} trainable parameters")
            self.group.log("info", f"module {self.name}: {mode} mode ({self.record['reason']})")
        if not copied:
            self.take_number(module)

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
        self._settled = reason in (_ONE_RANK, _DENSE)  # which all ranks have in common
        level = "info" if self._settled else "warning"
        self.group.log(level, f"module {self.name}: exact, nothing is compressed ({reason})")
        self.gradients = None
        self._backend.stop_recognising(f"module {self.name}: {reason}")

    def take_number(self, module: DistributedDataParallel) -> None:
        """Become one of the group's modules; the order is the same on all ranks. Idempotent."""
        if self.synchroniser is not None or self.gradients is not None:
            return
        records = _records.setdefault(self.group, [])
        if not any(record is self.record for record in records):
            records.append(self.record)
        if self._settled:
            return
        exact = self.record["mode"] == "exact"
        named = [] if exact else trainable(module)
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
        frozen = _frozen(module)
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
        if self.synchroniser is None:
            self._normalises.append(normalises)
        else:
            self.synchroniser.set_optimizer(normalises)

    def before_forward(self, module: DistributedDataParallel) -> None:
        """The sync point, under DDP's own condition; with join() it comes a little later."""
        ready = torch.is_grad_enabled() and module.require_backward_grad_sync
        if ready and not module._join_config.enable:
            self.sync(module)

    def sync(self, module: DistributedDataParallel) -> None:
        """Exchange the module, or agree that it stays exact. Collective in weights mode."""
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
        self.synchroniser.before_forward()
        self._settled = self.synchroniser.exact
        self.record["exchanges"] = self.synchroniser.exchanges

    def average(self) -> bool:
        """The mean by the exchange, if the module is or was exchanged. Collective."""
        if self.synchroniser is not None and (self.exchanged or self._hooked):
            self.synchroniser.average()
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


_attachments: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()
# By group: a record of each module that it has had.
_records: weakref.WeakKeyDictionary[Any, list[dict[str, Any]]] = weakref.WeakKeyDictionary()
# Parameters' owners by id, for optimizers and for average(); pruned when the module goes.
_owners: dict[int, weakref.ReferenceType[Attachment]] = {}
# Optimizers whose parameters have been looked at, with how many parameter groups they had then.
_seen_optimizers: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = (
    weakref.WeakKeyDictionary()
)


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


def attach(module: DistributedDataParallel, copied: bool = False) -> None:
    """Tie a new DDP module, or a copy of one, to the exchange if its group is a distro group."""
    if not backends_of(module.process_group):
        return
    attachment = Attachment(module, copied)
    _attachments[module] = attachment
    _seen_optimizers.clear()  # one of them may be this module's
    owner = weakref.ref(attachment)
    keys = [id(parameter) for _, parameter in trainable(module)]
    for key in keys:
        if not copied or key not in _owners:  # a shallow copy shares its parameters
            _owners[key] = owner
    weakref.finalize(attachment, _forget, keys, owner)
    if _before_forward not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_before_forward, prepend=True)


def _forget(keys: list[int], owner: weakref.ReferenceType[Attachment]) -> None:
    for key in keys:
        if _owners.get(key) is owner:
            del _owners[key]


def _before_forward(module: nn.Module, _arguments: object) -> None:
    attachment = _attachments.get(module)
    if attachment is not None and isinstance(module, DistributedDataParallel):
        attachment.before_forward(module)


def owners_of(module: nn.Module) -> list[Attachment]:
    """The attachments of a wrapper, of the module in it, of a part of it, or of a container."""
    own = _attachments.get(module)
    found = [] if own is None else [own]
    return found + [other for other in _attachments_of(module.parameters()) if other is not own]


def _before_optimizer_step(
    optimizer: torch.optim.Optimizer, _args: object, _kwargs: object
) -> None:
    if reason := _why_step_is_exact(optimizer):
        for attachment in _stepped_by(optimizer):
            attachment.leave(reason)


def _why_step_is_exact(optimizer: torch.optim.Optimizer) -> str:
    """Why weights that this optimizer steps cannot be exchanged; empty if they can."""
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        return "ZeroRedundancyOptimizer shards the optimizer's step"
    if isinstance(optimizer, torch.optim.LBFGS):
        return "LBFGS runs the model several times a step, and each rank another number of times"
    return ""


def _stepped_by(optimizer: torch.optim.Optimizer) -> list[Attachment]:
    return _attachments_of(p for group in optimizer.param_groups for p in group["params"])


def _after_optimizer_step(optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
    groups = len(optimizer.param_groups)
    if _seen_optimizers.get(optimizer) == groups:
        return
    _seen_optimizers[optimizer] = groups
    for attachment in _stepped_by(optimizer):
        attachment.take_optimizer(not isinstance(optimizer, _LINEAR))


def _attachments_of(parameters: Any) -> list[Attachment]:  # noqa: ANN401 - any iterable of parameters
    # In the parameters' order: averaging several is collective, so all ranks need the same order.
    keys = (id(parameter) for parameter in parameters)
    owners = dict.fromkeys(_owners[key] for key in keys if key in _owners)
    return [attachment for owner in owners if (attachment := owner()) is not None]


def _wrap(kind: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(kind, name, None)
    if original is not None:
        setattr(kind, name, functools.wraps(original)(make(original)))


def _wrap_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401, N807
        original(self, *args, **kwargs)
        attach(self)

    return __init__


def _wrap_setstate(original: Callable[..., Any]) -> Callable[..., Any]:
    """``copy.deepcopy`` and ``pickle`` make a wrapper without its ``__init__``."""

    def __setstate__(self: DistributedDataParallel, state: Any) -> None:  # noqa: ANN401, N807
        original(self, state)
        attach(self, copied=True)

    return __setstate__


def _wrap_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def register(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        attachment = _attachments.get(self)
        if attachment is not None:
            attachment.take_script_hook()
        return original(self, *args, **kwargs)

    return register


def _wrap_edit(original: Callable[..., Any]) -> Callable[..., Any]:
    """A method after which the weights are not what the exchange left.

    They are those of the module, or of one that it is a part of.
    """

    def edit(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        exchanged = [attachment for attachment in owners_of(self) if attachment.exchanged]
        for attachment in exchanged:
            attachment.synchroniser.before_edit()
        try:
            return original(self, *args, **kwargs)
        finally:  # a load that raises has copied what fitted
            for attachment in exchanged:
                attachment.synchroniser.after_edit()

    return edit


def _wrap_join(original: Callable[..., Any]) -> Callable[..., Any]:
    """Under join() ranks without data shadow the others' collectives; here all are at one place.

    Ranks with data come in their forward, after the all-reduces of join() itself; ranks without
    come before they shadow the backward. A sync point before those all-reduces would wait for ranks
    that wait in them.
    """

    def check(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        result = original(self, *args, **kwargs)
        joined = args[0] if args else kwargs["is_joined_rank"]
        ready = result if joined else torch.is_grad_enabled() and self.require_backward_grad_sync
        attachment = _attachments.get(self)
        if attachment is not None and ready:
            attachment.sync(self)
        return result

    return check


def _wrap_sharded_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401, N807
        original(self, *args, **kwargs)
        _before_optimizer_step(self, None, None)

    return __init__


@functools.cache
def install() -> None:
    """Wrap what must be wrapped, once a process."""
    global _before_forward
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    # Once, and under its own name: a wrapper that carries the hook is pickled by that name.
    _before_forward = torch.compiler.disable(_before_forward)
    _wrap(DistributedDataParallel, "__init__", _wrap_init)
    _wrap(DistributedDataParallel, "__setstate__", _wrap_setstate)
    _wrap(DistributedDataParallel, "register_comm_hook", _wrap_hook)
    _wrap(DistributedDataParallel, "_register_builtin_comm_hook", _wrap_hook)
    _wrap(DistributedDataParallel, "_sync_final_model", _wrap_edit)
    _wrap(DistributedDataParallel, "_check_global_requires_backward_grad_sync", _wrap_join)
    _wrap(nn.Module, "load_state_dict", _wrap_edit)
    _wrap(ZeroRedundancyOptimizer, "__init__", _wrap_sharded_optimizer)
    register_optimizer_step_pre_hook(_before_optimizer_step)
    register_optimizer_step_post_hook(_after_optimizer_step)


def add_record(group: Any, name: str, mode: str, reason: str) -> None:  # noqa: ANN401
    """Have stats() show a module that is not attached."""
    record = {"name": name, "exchanges": 0, "mode": mode, "reason": reason}
    _records.setdefault(group, []).append(record)


def modules_of(group: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """The modules that a group has had, with the mode each got and why."""
    for attachment in _attachments.values():
        if attachment.gradients is not None:
            attachment.record["exchanges"] = attachment.gradients.backwards
    return [dict(record) for record in _records.get(group, [])]
