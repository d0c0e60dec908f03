"""Sharded modules: what of them is compressed, and a line in the log that says why not.

FSDP gathers the weights at each forward, as many bytes as the gradients have: nothing is gained by
compressing the latter. Between replicas of shards (hybrid sharding) much is: there the shards are
exchanged in weights mode (`_replicas.py`), and gradients are compressed in modes ef and demo. Both
kinds of FSDP are met at the root module's first forward, when it is known which module is the root.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp import _runtime_utils as fsdp1
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.distributed.fsdp._traversal_utils import _get_fsdp_states

from torch_distro._attachment import add_record
from torch_distro._groups import backends_of
from torch_distro._replicas import Replicas, Shard, reducing_of

_HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)

# By root that has begun (FSDP1's wrapper, FSDP2's state): its attachment, if it has replicas.
_roots: weakref.WeakKeyDictionary[Any, Replicas | None] = weakref.WeakKeyDictionary()


def _exchanges_weights(replicate: dist.ProcessGroup) -> bool:
    backends = backends_of(replicate)
    if not backends:
        return False
    group = backends[0].group
    return group.mode != "dense" and not group.exchanges_gradients and len(group.sites) > 1


def _note(
    module: nn.Module, shard: dist.ProcessGroup | None, replicate: dist.ProcessGroup | None
) -> None:
    """A root module whose parameters lie over `shard`, in replicas over `replicate`, is exact."""
    between = backends_of(replicate) if replicate is not None else []
    backends = between or (backends_of(shard) if shard is not None else [])
    if not backends:
        return
    group = backends[0].group
    name = _name_of(module)
    if between and group.exchanges_gradients:
        reason = f"FSDP: the gradients of {group.world_size} replicas are compressed"
        add_record(group, name, group.mode, reason)
        group.log("info", f"module {name}: {group.mode} mode ({reason})")
        return
    if group.mode == "dense":
        reason = "DISTRO_MODE=dense"
    elif shard is None:
        reason = (
            f"FSDP of {group.world_size} replicas that are not sharded: compression of weights "
            "needs DistributedDataParallel"
        )
    elif replicate is not None and replicate.size() == 1:
        reason = f"hybrid sharding over {shard.size()} ranks, of one replica"
    elif len(group.sites) == 1:
        kind = "sharded over the" if replicate is None else "hybrid sharding over"
        reason = f"{kind} {group.world_size} ranks of one site"
    elif replicate is not None:
        reason = (
            f"hybrid sharding over {shard.size()} ranks in a model of which a part is sharded "
            "otherwise"
        )
    elif len(group.sites) < group.world_size:
        reason = (
            f"sharded over {shard.size()} ranks of several sites by a mesh or group of the "
            "script's own. DISTRO_SITE makes hybrid sharding (HSDP) of it where FSDP is given none"
        )
    else:
        reason = (
            f"sharded over {shard.size()} ranks: gathering the weights moves as much as the "
            "gradients would. Compression needs replicas: set DISTRO_SITE to the same label on the "
            "ranks of each place, or use hybrid sharding (HSDP) by a mesh of two dimensions"
        )
    add_record(group, name, "exact", reason)
    level = "info" if group.mode == "dense" or len(group.sites) == 1 else "warning"
    group.log(level, f"module {name}: exact, nothing is compressed ({reason})")


def _name_of(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("FSDP")


def _fsdp1_replicas(root: Any) -> Replicas | None:  # noqa: ANN401 - FSDP1's wrapper
    """The attachment of a root module; None where it stays as FSDP has it."""
    states: list[Any] = [state for state in _get_fsdp_states(root) if state._handle is not None]
    groups = {getattr(state, "_inter_node_pg", None) for state in states}
    hybrid = {state.sharding_strategy in _HYBRID for state in states}
    if hybrid != {True} or len(groups) != 1:
        return None
    group = groups.pop()
    if group is None or not _exchanges_weights(group):
        return None
    handles = [state._handle for state in states]
    offloaded = any(handle._offload_params for handle in handles)
    known = weakref.ref(root)

    def shards() -> list[Shard]:
        module = known()
        return _fsdp1_shards(module) if module is not None else []

    def reshard() -> None:
        module = known()
        for state in _get_fsdp_states(module) if module is not None else []:
            handle = state._handle
            # Gathered by a forward without a backward, and kept: it would be used again.
            if handle is not None and not handle.needs_unshard():
                fsdp1._reshard(state, handle, True)

    why_exact = "FSDP's CPU offload" if offloaded else ""
    return Replicas(root, _name_of(root.module), group, shards, handles, reshard, why_exact)


def _fsdp1_shards(root: Any) -> list[Shard]:  # noqa: ANN401
    """This rank's part of each parameter: frozen ones may share a flat parameter with others."""
    found = []
    for prefix, module in root.named_modules():
        handle = module._handle if isinstance(module, FullyShardedDataParallel) else None
        if handle is None:
            continue
        flat = handle.flat_param
        parameters = flat._params or [flat] * len(flat._fqns)  # of use_orig_params
        parts = zip(flat._fqns, parameters, flat._shard_param_infos, strict=True)
        for name, parameter, where in parts:
            begin, count = where.offset_in_shard or 0, where.numel_in_shard or 0
            memory = flat._local_shard[begin : begin + count]
            name = clean_tensor_name(f"{prefix}.{name}".lstrip("."))
            found.append(Shard(name, memory, parameter.requires_grad))
    return found


def _fsdp2_groups(root: Any) -> list[Any]:  # noqa: ANN401 - private types of FSDP2
    """The groups of parameters of a root's state and of those below it."""
    found = []
    for state in root._state_ctx.all_states:
        # One group of parameters a state up to 2.12, several in later torch.
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        found += [group for group in groups if group is not None]
    return found


def _fsdp2_shards(root: Any) -> list[Shard]:  # noqa: ANN401
    names = {module: name for name, module in root._modules[0].named_modules()}
    found = []
    for group in _fsdp2_groups(root):
        for parameter in group.fsdp_params:
            # Not by `_param_fqn`: it is unknown of what was gathered at the first forward.
            where, sharded = parameter._module_info, parameter.sharded_param
            name = clean_tensor_name(f"{names[where.module]}.{where.param_name}".lstrip("."))
            found.append(Shard(name, sharded._local_tensor, sharded.requires_grad))
    return found


def _fsdp2_replicas(root: Any) -> Replicas | None:  # noqa: ANN401
    groups = _fsdp2_groups(root)
    replicate = {getattr(group.mesh_info, "replicate_process_group", None) for group in groups}
    sharded = {getattr(group.mesh_info, "shard_process_group", None) for group in groups}
    if len(replicate) != 1 or None in sharded:
        return None
    replicas = replicate.pop()
    if replicas is None or not _exchanges_weights(replicas):
        return None
    hooked = any(group._all_reduce_hook is not None for group in groups)
    known = weakref.ref(root)

    def reshard() -> None:
        state = known()
        for group in _fsdp2_groups(state) if state is not None else []:
            group.wait_for_unshard()  # the script may have called unshard() ahead of the forward
            for parameter in group.fsdp_params if group.is_unsharded else ():
                # What was set while it was gathered would be lost.
                trained = parameter.unsharded_param.requires_grad
                parameter.sharded_param.requires_grad_(trained)
            group._to_sharded()

    def shards() -> list[Shard]:
        state = known()
        return _fsdp2_shards(state) if state is not None else []

    why_exact = "the script has an all-reduce hook of its own" if hooked else ""
    module = root._modules[0]
    return Replicas(module, _name_of(module), replicas, shards, groups, reshard, why_exact)


def meet(module: nn.Module) -> None:
    """Meet the sharded modules in a module now, if their first forward is still to come.

    FSDP takes whom it meets first for a root: this is for what only roots are given to.
    """
    for part in module.modules():
        if isinstance(part, FullyShardedDataParallel):
            fsdp1._lazy_init(part, part)
            if part._is_root and part not in _roots:
                _meet_fsdp1(part)
        elif (state := _fsdp2_state(part)) is not None:
            state._lazy_init()
            if state._is_root and state not in _roots:
                _meet_fsdp2(state)


def _fsdp2_state(module: nn.Module) -> Any:  # noqa: ANN401
    return module._get_fsdp_state() if isinstance(module, FSDPModule) else None


def _wrap_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of FSDP1's wrapper, which is told here whether it is the root."""

    # Dynamo leaves FSDP's own wrapper alone and compiles what is in it; so with this one.
    @functools.partial(torch.compiler.disable, recursive=False)
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the module's own
        _before_fsdp1_forward(self)
        return original(self, *args, **kwargs)

    return forward


def _before_fsdp1_forward(module: Any) -> None:  # noqa: ANN401
    fsdp1._lazy_init(module, module)
    if not module._is_root:
        return
    if module not in _roots:
        _meet_fsdp1(module)
    replicas = _roots[module]
    if replicas is not None and torch.is_grad_enabled() and module._sync_gradients:
        replicas.exchange()


def _wrap_reduce_grad(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reduce_grad(state: Any, handle: Any) -> Any:  # noqa: ANN401
        with reducing_of(handle):
            return original(state, handle)

    return reduce_grad


def _wrap_root_pre_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of FSDP2's state, called at each forward; inside the root's own it does nothing."""

    @functools.wraps(original)
    def root_pre_forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        self._lazy_init()
        if self._is_root and self._state_ctx.iter_forward_root is None:
            if self not in _roots:
                _meet_fsdp2(self)
            replicas = _roots[self]
            if replicas is not None and torch.is_grad_enabled() and _synchronises(self):
                replicas.exchange()
        return original(self, *args, **kwargs)

    return root_pre_forward


def _meet_fsdp1(root: Any) -> None:  # noqa: ANN401
    _roots[root] = replicas = _fsdp1_replicas(root)
    if replicas is not None:
        return
    if root.sharding_strategy == ShardingStrategy.NO_SHARD:
        _note(root.module, None, root.process_group)
    else:
        _note(root.module, root.process_group, getattr(root, "_inter_node_pg", None))


def _meet_fsdp2(root: Any) -> None:  # noqa: ANN401
    _roots[root] = replicas = _fsdp2_replicas(root)
    if replicas is not None:
        return
    for group in _fsdp2_groups(root):
        shard = getattr(group.mesh_info, "shard_process_group", None)
        if shard is not None:
            replicate = getattr(group.mesh_info, "replicate_process_group", None)
            _note(root._modules[0], shard, replicate)
            return


def _synchronises(root: Any) -> bool:  # noqa: ANN401
    """Not between set_requires_gradient_sync(False) and (True)."""
    return all(group.reduce_grads and group.all_reduce_grads for group in _fsdp2_groups(root))


def _wrap_post_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def post_backward(self: Any, *args: Any) -> Any:  # noqa: ANN401
        with reducing_of(self):
            return original(self, *args)

    return post_backward


@functools.cache
def install() -> None:
    """Wrap what must be wrapped, once a process. What this torch lacks is left alone."""
    global _before_fsdp1_forward
    _before_fsdp1_forward = torch.compiler.disable(_before_fsdp1_forward)
    forward = FullyShardedDataParallel.forward
    FullyShardedDataParallel.forward = _wrap_forward(forward)  # type: ignore[method-assign]
    fsdp1._reduce_grad = _wrap_reduce_grad(fsdp1._reduce_grad)  # type: ignore[assignment]
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
        from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

        pre_forward, post_backward = FSDPState._root_pre_forward, FSDPParamGroup.post_backward
    except (ImportError, AttributeError):
        return  # private: modules stay exact all the same, without the line that says so
    FSDPState._root_pre_forward = _wrap_root_pre_forward(pre_forward)  # type: ignore[method-assign]
    FSDPParamGroup.post_backward = _wrap_post_backward(post_backward)  # type: ignore[method-assign]
