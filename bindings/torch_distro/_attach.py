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


class Attachment:
    """What ties one DDP module to the exchange. Holds the module weakly."""

    def __init__(self, module: DistributedDataParallel, backend: Any) -> None:  # noqa: ANN401
        self.group = backend.group
        self.process_group = module.process_group
        # What stats() shows; outlives the module.
        self.record: dict[str, Any] = {"name": type(module.module).__name__, "exchanges": 0}
        _records.setdefault(self.group, []).append(self.record)
        self.script_hook = False
        self.synchroniser: Any = None  # weights mode
        self.gradients: Any = None  # modes ef and demo
        self._backend = backend
        self._hooked = False
        reason = _why_exact(module, self.group)
        if reason:
            self._go_exact(reason)
            return
        named = trainable(module)
        self.names = [name for name, _ in named]
        self.shapes = [parameter.shape for _, parameter in named]
        parameters = [parameter for _, parameter in named]
        core, mode = extension(), self.group.mode
        if self.group.exchanges_gradients:
            self.gradients = core.ModuleGradients(backend, parameters, self.names)
        else:
            self.synchroniser = core.ModuleSynchroniser(backend, parameters, self.names)
            mode = "weights"
        self._note(mode, f"DDP, {sum(p.numel() for p in parameters)} trainable parameters")
        self.group.log("info", f"module {self.name}: {mode} mode ({self.record['reason']})")

    @property
    def name(self) -> str:
        return self.record["name"]

    @property
    def exchanged(self) -> bool:
        """Whether the module is in weights mode."""
        return self.record["mode"] == "weights"

    def _note(self, mode: str, reason: str) -> None:
        self.record.update(mode=mode, reason=reason)

    def _go_exact(self, reason: str) -> None:
        self._note("exact", reason)
        level = "info" if reason.startswith(("DISTRO_MODE", "one rank")) else "warning"
        self.group.log(level, f"module {self.name}: exact, nothing is compressed ({reason})")
        self.gradients = None
        self._backend.stop_recognising(f"module {self.name}: {reason}")

    def leave(self, reason: str) -> None:
        """Reduce gradients exactly from now on."""
        if self.exchanged:
            self.synchroniser.go_exact()
            self._go_exact(reason)

    def before_forward(self, module: DistributedDataParallel) -> None:
        """The sync point, under DDP's own condition; with join() it comes a little later."""
        ready = torch.is_grad_enabled() and module.require_backward_grad_sync
        if ready and not module._join_config.enable:
            self.sync(module)

    def sync(self, module: DistributedDataParallel) -> None:
        """Exchange the module. Collective in weights mode."""
        if self.gradients is not None:
            if not self._hooked:
                extension().ModuleGradients.attach(self.gradients, module.reducer)
                self._hooked = True
            return
        if self.script_hook or (not self.exchanged and not self._hooked):
            return
        if not self._hooked:
            extension().ModuleSynchroniser.attach(self.synchroniser, module.reducer)
            self._hooked = True
        self.synchroniser.before_forward()
        self.record["exchanges"] = self.synchroniser.exchanges

    def take_script_hook(self) -> None:
        """The script registers a communication hook of its own: step aside.

        Raises:
            RuntimeError: too late, the module has begun to train.
        """
        if not self.exchanged and self.gradients is None:
            return
        if self._hooked:
            raise RuntimeError(
                "torch_distro: register a communication hook before the first training forward "
                "(after it the module's gradients are exchanged by the distro backend)"
            )
        self.script_hook = True
        self._go_exact("the script has a communication hook of its own")


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
    ignored: set[str] = getattr(module, "parameters_to_ignore", set())
    return [
        (name, parameter)
        for name, parameter in module.module.named_parameters()
        if parameter.requires_grad and name not in ignored
    ]


def _why_exact(module: DistributedDataParallel, group: Any) -> str:  # noqa: ANN401
    """Why this module cannot be exchanged; empty if it can."""
    if group.world_size == 1:
        return "one rank"
    if group.mode == "dense":
        return "DISTRO_MODE=dense"
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
        if parameter.device.type != "cpu":
            return f"parameter {name} is on {parameter.device}, which is not available yet"
        if parameter.dtype not in _FLOATS or parameter.layout != torch.strided:
            return f"parameter {name} is {parameter.dtype}, {parameter.layout}"
    return ""


def attach(module: DistributedDataParallel) -> None:
    """Tie a new DDP module to the exchange if its group is a distro group."""
    for backend in backends_of(module.process_group):
        attachment = Attachment(module, backend)
        _attachments[module] = attachment
        _seen_optimizers.clear()  # one of them may be this module's
        owner = weakref.ref(attachment)
        keys = [id(parameter) for _, parameter in trainable(module)]
        _owners.update(dict.fromkeys(keys, owner))
        weakref.finalize(attachment, _forget, keys, owner)
        module.register_forward_pre_hook(_before_forward, prepend=True)
        return


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


def _after_optimizer_step(optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
    groups = optimizer.param_groups
    if _seen_optimizers.get(optimizer) == len(groups):
        return
    _seen_optimizers[optimizer] = len(groups)
    sharded = any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__)
    for attachment in _attachments_of(
        parameter for group in groups for parameter in group["params"]
    ):
        if sharded:
            attachment.leave("ZeroRedundancyOptimizer shards the optimizer's step")
        elif attachment.exchanged:
            attachment.synchroniser.set_optimizer(not isinstance(optimizer, torch.optim.SGD))


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
        try:
            return original(self, *args, **kwargs)
        finally:  # a load that raises has copied what fitted
            for attachment in owners_of(self):
                if attachment.exchanged:
                    attachment.synchroniser.mark()

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
        parameters = (p for group in self.param_groups for p in group["params"])
        for attachment in _attachments_of(parameters):
            attachment.leave("ZeroRedundancyOptimizer shards the optimizer's step")

    return __init__


@functools.cache
def install() -> None:
    """Wrap what must be wrapped, once a process."""
    global _before_forward
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.optim.optimizer import register_optimizer_step_post_hook

    # Once, and under its own name: a wrapper that carries the hook is pickled by that name.
    _before_forward = torch.compiler.disable(_before_forward)
    _wrap(DistributedDataParallel, "__init__", _wrap_init)
    _wrap(DistributedDataParallel, "register_comm_hook", _wrap_hook)
    _wrap(DistributedDataParallel, "_register_builtin_comm_hook", _wrap_hook)
    _wrap(DistributedDataParallel, "_sync_final_model", _wrap_edit)
    _wrap(DistributedDataParallel, "_check_global_requires_backward_grad_sync", _wrap_join)
    _wrap(nn.Module, "load_state_dict", _wrap_edit)
    _wrap(ZeroRedundancyOptimizer, "__init__", _wrap_sharded_optimizer)
    register_optimizer_step_post_hook(_after_optimizer_step)


def modules_of(group: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """The modules that a group has had, with the mode each got and why."""
    for attachment in _attachments.values():
        if attachment.gradients is not None:
            attachment.record["exchanges"] = attachment.gradients.backwards
    return [dict(record) for record in _records.get(group, [])]
