"""How wrapped modules of an unchanged script are found and kept in step.

When the first distro group is made, ``DistributedDataParallel.__init__`` is wrapped (a class
attribute, so that it works whatever the script imported before). Each DDP module on a distro group
then gets a forward-pre hook, the one place where it is exchanged, and a communication hook that
hands its gradient buckets back as they are. In modes ``ef`` and ``demo`` the communication hook is
what exchanges, and the forward-pre hook only registers it.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_distro._attachment import Attachment, records_of, trainable
from torch_distro._groups import backends_of

# Their steps scale with the gradient, so that the mean of the ranks' steps is the step on the mean
# gradient. All others normalise in some way.
_LINEAR = (torch.optim.SGD, torch.optim.ASGD)

_attachments: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()
# Parameters' owners by id, for optimizers and for average(); pruned when the module goes.
# Of several wrappers of a parameter the last one counts, as long as it lives.
_owners: dict[int, list[weakref.ReferenceType[Attachment]]] = {}
# Optimizers whose parameters have been looked at, with how many parameter groups they had then.
_seen_optimizers: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = (
    weakref.WeakKeyDictionary()
)


def attach(module: DistributedDataParallel, copied: bool = False) -> None:
    """Tie a new DDP module, or a copy of one, to the exchange if its group is a distro group."""
    if not backends_of(module.process_group):
        return
    attachment = Attachment(module, copied)
    add_owner(module, attachment, [parameter for _, parameter in trainable(module)], copied)
    if _before_forward not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_before_forward, prepend=True)


def add_owner(
    module: nn.Module,
    attachment: Attachment,
    parameters: Iterable[torch.Tensor],
    copied: bool = False,
) -> None:
    """Find the attachment by its module, and by what its optimizers step."""
    _attachments[module] = attachment
    _seen_optimizers.clear()  # one of them may be this module's
    owner = weakref.ref(attachment)
    keys = [id(parameter) for parameter in parameters]
    for key in keys:
        owners = _owners.setdefault(key, [])
        owners.insert(0 if copied else len(owners), owner)  # a shallow copy shares its parameters
    weakref.finalize(attachment, _forget, keys, owner)


def _forget(keys: list[int], owner: weakref.ReferenceType[Attachment]) -> None:
    for key in keys:
        _owners[key].remove(owner)
        if not _owners[key]:
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
    owners = dict.fromkeys(_owners[key][-1] for key in keys if key in _owners)
    return [attachment for owner in owners if (attachment := owner()) is not None]


def _wrap(
    kind: object, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
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
        with _editing(owners_of(self)):
            return original(self, *args, **kwargs)

    return edit


def _wrap_checkpoint_load(original: Callable[..., Any]) -> Callable[..., Any]:
    """It writes into the tensors of a state, which are a module's own where its state_dict is."""

    def load(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with _editing(list(_attachments.values())):
            return original(*args, **kwargs)

    return load


def _wrap_checkpoint_save(original: Callable[..., Any]) -> Callable[..., Any]:
    def save(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        for attachment in list(_attachments.values()):
            attachment.before_save()
        return original(*args, **kwargs)

    return save


@contextlib.contextmanager
def _editing(attachments: Iterable[Attachment]) -> Iterator[None]:
    exchanged = [attachment for attachment in attachments if attachment.exchanged]
    for attachment in exchanged:
        attachment.synchroniser.before_edit()
    try:
        yield
    finally:  # a load that raises has copied what fitted
        for attachment in exchanged:
            attachment.synchroniser.after_edit()


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
            attachment.sync(self, joined)
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
    from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
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
    # By `load` and `save`, under whatever name a script has imported them.
    _wrap(state_dict_loader, "_load_state_dict", _wrap_checkpoint_load)
    _wrap(state_dict_saver, "_save_state_dict", _wrap_checkpoint_save)
    _wrap(ZeroRedundancyOptimizer, "__init__", _wrap_sharded_optimizer)
    register_optimizer_step_pre_hook(_before_optimizer_step)
    register_optimizer_step_post_hook(_after_optimizer_step)


def modules_of(group: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """The modules that a group has had, with the mode each got and why."""
    for attachment in _attachments.values():
        if attachment.gradients is not None:
            attachment.record["exchanges"] = attachment.gradients.backwards
    return records_of(group)
