"""FSDP2, fully_shard: its root modules, their shards, and where it reduces."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._common_utils import clean_tensor_name

from torch_distro._replicas import Replicas, Shard, reducing_of
from torch_distro._roots import exchanges_weights, name_of, note_exact, roots


def _groups(root: Any) -> list[Any]:  # noqa: ANN401 - private types of FSDP2
    """The groups of parameters of a root's state and of those below it."""
    found = []
    for state in root._state_ctx.all_states:
        # One group of parameters a state up to 2.12, several in later torch.
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        found += [group for group in groups if group is not None]
    return found


def _shards(root: Any) -> list[Shard]:  # noqa: ANN401
    names = {module: name for name, module in root._modules[0].named_modules()}
    found = []
    for group in _groups(root):
        for parameter in group.fsdp_params:
            # Not by `_param_fqn`: it is unknown of what was gathered at the first forward.
            where, sharded = parameter._module_info, parameter.sharded_param
            name = clean_tensor_name(f"{names[where.module]}.{where.param_name}".lstrip("."))
            found.append(Shard(name, sharded._local_tensor, sharded.requires_grad))
    return found


def _replicas(root: Any) -> Replicas | None:  # noqa: ANN401
    groups = _groups(root)
    replicate = {getattr(group.mesh_info, "replicate_process_group", None) for group in groups}
    sharded = {getattr(group.mesh_info, "shard_process_group", None) for group in groups}
    if len(replicate) != 1 or None in sharded:
        return None
    replicas = replicate.pop()
    if replicas is None or not exchanges_weights(replicas):
        return None
    hooked = any(group._all_reduce_hook is not None for group in groups)
    known = weakref.ref(root)

    def reshard() -> None:
        state = known()
        for group in _groups(state) if state is not None else []:
            group.wait_for_unshard()  # the script may have called unshard() ahead of the forward
            for parameter in group.fsdp_params if group.is_unsharded else ():
                # What was set while it was gathered would be lost.
                trained = parameter.unsharded_param.requires_grad
                parameter.sharded_param.requires_grad_(trained)
            group._to_sharded()

    def shards() -> list[Shard]:
        state = known()
        return _shards(state) if state is not None else []

    why_exact = "the script has an all-reduce hook of its own" if hooked else ""
    module = root._modules[0]
    return Replicas(module, name_of(module), replicas, shards, groups, reshard, why_exact)


def meet(module: FSDPModule) -> None:
    """Meet a module now, if it is a root and its first forward is still to come."""
    state: Any = module._get_fsdp_state()
    state._lazy_init()
    if state._is_root and state not in roots:
        _meet(state)


def _meet(root: Any) -> None:  # noqa: ANN401
    roots[root] = replicas = _replicas(root)
    if replicas is not None:
        return
    for group in _groups(root):
        shard = getattr(group.mesh_info, "shard_process_group", None)
        if shard is not None:
            replicate = getattr(group.mesh_info, "replicate_process_group", None)
            note_exact(root._modules[0], shard, replicate)
            return


def _synchronises(root: Any) -> bool:  # noqa: ANN401
    """Not between set_requires_gradient_sync(False) and (True)."""
    return all(group.reduce_grads and group.all_reduce_grads for group in _groups(root))


def _wrap_root_pre_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of FSDP2's state, called at each forward; inside the root's own it does nothing."""

    @functools.wraps(original)
    def root_pre_forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        self._lazy_init()
        if self._is_root and self._state_ctx.iter_forward_root is None:
            if self not in roots:
                _meet(self)
            replicas = roots[self]
            if replicas is not None and torch.is_grad_enabled() and _synchronises(self):
                replicas.exchange()
        return original(self, *args, **kwargs)

    return root_pre_forward


def _wrap_post_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def post_backward(self: Any, *args: Any) -> Any:  # noqa: ANN401
        with reducing_of(self):
            return original(self, *args)

    return post_backward


def install() -> None:
    """Wrap what must be wrapped, once a process. What this torch lacks is left alone."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
        from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

        pre_forward, post_backward = FSDPState._root_pre_forward, FSDPParamGroup.post_backward
    except (ImportError, AttributeError):
        return  # private: modules stay exact all the same, without the line that says so
    FSDPState._root_pre_forward = _wrap_root_pre_forward(pre_forward)  # type: ignore[method-assign]
    FSDPParamGroup.post_backward = _wrap_post_backward(post_backward)  # type: ignore[method-assign]
