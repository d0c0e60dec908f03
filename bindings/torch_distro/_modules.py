"""How wrapped modules of an unchanged script are found and kept in step.

When the first distro group is made, ``DistributedDataParallel.__init__`` is wrapped (a class
attribute, so that it works whatever the script imported before). Each DDP module on a distro group
then gets a forward-pre hook, the one place where it is exchanged, and a communication hook that
hands its gradient buckets back as they are.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_distro._extension import extension
from torch_distro._stats import backends_of

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Attachment:
    """What ties one DDP module to the exchange. Holds the module weakly."""

    def __init__(self, module: DistributedDataParallel, backend: Any) -> None:  # noqa: ANN401
        self.group = backend.group
        self.name = type(module.module).__name__
        self.mode = "exact"
        self.reason = ""
        self.script_hook = False
        self.synchroniser: Any = None
        self._hooked = False
        reason = _why_exact(module, self.group)
        if reason:
            self._go_exact(reason)
            return
        named = trainable(module)
        self.names = [name for name, _ in named]
        self.shapes = [parameter.shape for _, parameter in named]
        self.synchroniser = extension().ModuleSynchroniser(
            backend, [parameter for _, parameter in named], self.names
        )
        self.mode = "weights"
        self.reason = f"DDP, {sum(p.numel() for _, p in named)} trainable parameters"
        self.group.log("info", f"module {self.name}: weights mode ({self.reason})")

    def _go_exact(self, reason: str) -> None:
        self.mode, self.reason = "exact", reason
        level = "info" if reason.startswith(("DISTRO_MODE", "one rank")) else "warning"
        self.group.log(level, f"module {self.name}: exact, nothing is compressed ({reason})")

    def leave(self, reason: str) -> None:
        """Reduce gradients exactly from now on."""
        if self.synchroniser is not None and self.mode != "exact":
            self.synchroniser.go_exact()
            self._go_exact(reason)

    def before_forward(self, module: DistributedDataParallel) -> None:
        """The sync point, under DDP's own condition."""
        if self.synchroniser is None or self.script_hook:
            return
        if not (torch.is_grad_enabled() and module.require_backward_grad_sync):
            return
        if not self._hooked:
            extension().ModuleSynchroniser.attach(self.synchroniser, module.reducer)
            self._hooked = True
        self.synchroniser.before_forward()

    def take_script_hook(self) -> None:
        """The script registers a communication hook of its own: step aside.

        Raises:
            RuntimeError: too late, the module has begun to train.
        """
        if self.synchroniser is None:
            return
        if self._hooked:
            raise RuntimeError(
                "torch_distro: register a communication hook before the first training forward "
                "(after it the module's gradients are exchanged by the distro backend)"
            )
        self.script_hook = True
        self._go_exact("the script has a communication hook of its own")


_attachments: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()
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
    """Why this module cannot be exchanged in weights mode; empty if it can."""
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
        owner = weakref.ref(attachment)
        keys = [id(parameter) for _, parameter in trainable(module)]
        _owners.update(dict.fromkeys(keys, owner))
        weakref.finalize(attachment, _forget, keys, owner)
        module.register_forward_pre_hook(torch.compiler.disable(_before_forward), prepend=True)
        return


def _forget(keys: list[int], owner: weakref.ReferenceType[Attachment]) -> None:
    for key in keys:
        if _owners.get(key) is owner:
            del _owners[key]


def _before_forward(module: nn.Module, _arguments: object) -> None:
    attachment = _attachments.get(module)
    if attachment is not None and isinstance(module, DistributedDataParallel):
        attachment.before_forward(module)


def _owner_of(module: nn.Module) -> Attachment | None:
    """The attachment of a wrapper, of the module in it, or of a part of that."""
    found = _attachments.get(module)
    if found is not None:
        return found
    for parameter in module.parameters():
        owner = _owners.get(id(parameter))
        if owner is not None:
            return owner()
    return None


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
        elif attachment.synchroniser is not None:
            attachment.synchroniser.set_optimizer(not isinstance(optimizer, torch.optim.SGD))


def _attachments_of(parameters: Any) -> list[Attachment]:  # noqa: ANN401 - any iterable of parameters
    owners = {_owners[id(parameter)] for parameter in parameters if id(parameter) in _owners}
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
        result = original(self, *args, **kwargs)
        attachment = _owner_of(self)
        if attachment is not None and attachment.synchroniser is not None:
            attachment.synchroniser.mark()
        return result

    return edit


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
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.optim.optimizer import register_optimizer_step_post_hook

    _wrap(DistributedDataParallel, "__init__", _wrap_init)
    _wrap(DistributedDataParallel, "register_comm_hook", _wrap_hook)
    _wrap(DistributedDataParallel, "_register_builtin_comm_hook", _wrap_hook)
    _wrap(DistributedDataParallel, "_sync_final_model", _wrap_edit)
    _wrap(nn.Module, "load_state_dict", _wrap_edit)
    _wrap(ZeroRedundancyOptimizer, "__init__", _wrap_sharded_optimizer)
    register_optimizer_step_post_hook(_after_optimizer_step)


def modules_of(group: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """The modules of a group, with the mode each got and why."""
    return [
        {
            "name": attachment.name,
            "mode": attachment.mode,
            "reason": attachment.reason,
            "exchanges": attachment.synchroniser.exchanges if attachment.synchroniser else 0,
        }
        for attachment in _attachments.values()
        if attachment.group is group
    ]


def average(module: nn.Module) -> None:
    """Replace the weights by their exact mean over all ranks, in place.

    The last act of a training, before the last evaluation and the save: a rank's own weights carry
    its unsent moves, the mean does not. Training may go on afterwards. On a module that is not in
    weights mode it is an exact mean as well.

    Args:
        module: the DDP module (or the module in it). Collective: every rank of its group calls it.

    Raises:
        torch.distributed.DistBackendError: a rank is dead, late, or does something else.
    """
    attachment = _owner_of(module)
    if (
        attachment is not None
        and attachment.synchroniser is not None
        and not attachment.script_hook
    ):
        attachment.synchroniser.average()
        return
    if not dist.is_available() or not dist.is_initialized():
        return
    group = getattr(module, "process_group", None) or dist.group.WORLD
    with torch.no_grad():
        for parameter in module.parameters():
            wide = (
                parameter.float()
                if parameter.dtype in (torch.float16, torch.bfloat16)
                else parameter
            )
            dist.all_reduce(wide, group=group)
            parameter.copy_(wide / dist.get_world_size(group))


def resync(module: nn.Module) -> None:
    """Ask for a resync: this rank has edited the weights.

    All ranks take the exact mean at their next exchange. Not a collective: one rank may call it
    alone. ``load_state_dict`` asks by itself.

    Args:
        module: the DDP module, the module in it, or a part of that.

    Raises:
        ValueError: the module is not wrapped on a distro group.
    """
    _synchroniser_of(module).mark()


def _synchroniser_of(module: nn.Module) -> Any:  # noqa: ANN401
    attachment = _owner_of(module)
    if attachment is None or attachment.synchroniser is None:
        raise ValueError(
            "this module is not in weights mode: "
            "wrap it in DistributedDataParallel on a distro group"
        )
    return attachment.synchroniser


def state_dict(module: nn.Module) -> dict[str, Any]:
    """The exchange's state of this rank.

    It is what a per-rank resume needs beside the script's own checkpoint: that one, usually rank
    0's, knows nothing of what the other ranks have moved and not sent yet. Save this on every rank,
    at the same step, in a file of its own.

    Args:
        module: a DDP module in weights mode. Not a collective.

    Returns:
        ``reference`` and ``residual`` (W and R by parameter name, fp32, in the parameters' shapes;
        R holds an exchange in flight, too), ``exchanges`` (count), ``share`` (weights are
        W + share * R).

    Raises:
        ValueError: the module is not in weights mode.
    """
    synchroniser, attachment = _synchroniser_of(module), _owner_of(module)
    assert attachment is not None
    state = synchroniser.state()
    for part in ("reference", "residual"):
        shaped = zip(attachment.names, state[part], attachment.shapes, strict=True)
        state[part] = {name: flat.reshape(shape) for name, flat, shape in shaped}
    return state


def load_state_dict(module: nn.Module, state: dict[str, Any]) -> None:
    """Take up what :func:`state_dict` gave; leaves the weights at W + share * R.

    Args:
        module: the same DDP module, wrapped again, before its first training forward. On every
            rank, or on none.
        state: this rank's own, saved at the same step as the others'.

    Raises:
        ValueError: the module is not in weights mode, or the state has other parameters.
        torch.distributed.DistBackendError: the module has begun to train, or shapes differ.
    """
    synchroniser, attachment = _synchroniser_of(module), _owner_of(module)
    assert attachment is not None
    for part in ("reference", "residual"):
        if set(state[part]) != set(attachment.names):
            differing = sorted(set(state[part]) ^ set(attachment.names))
            raise ValueError(
                f"the state has other parameters than the module: {', '.join(differing)}"
            )
    synchroniser.load(
        [state["reference"][name] for name in attachment.names],
        [state["residual"][name] for name in attachment.names],
        state["exchanges"],
        state["share"],
    )
