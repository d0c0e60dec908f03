"""FSDP1, FullyShardedDataParallel: its root modules, their shards, and where it reduces."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp import _runtime_utils as fsdp1
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.distributed.fsdp._traversal_utils import _get_fsdp_states

from torch_distro._replicas import Replicas, Shard, reducing_of
from torch_distro._roots import exchanges_weights, name_of, note_exact, roots

_HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)


def _replicas(root: Any) -> Replicas | None:  # noqa: ANN401 - FSDP1's wrapper
    """The attachment of a root module; None where it stays as FSDP has it."""
    states: list[Any] = [state for state in _get_fsdp_states(root) if state._handle is not None]
    groups = {getattr(state, "_inter_node_pg", None) for state in states}
    hybrid = {state.sharding_strategy in _HYBRID for state in states}
    if hybrid != {True} or len(groups) != 1:
        return None
    group = groups.pop()
    if group is None or not exchanges_weights(group):
        return None
    handles = [state._handle for state in states]
    offloaded = any(handle._offload_params for handle in handles)
    known = weakref.ref(root)

    def shards() -> list[Shard]:
        module = known()
        return _shards(module) if module is not None else []

    def reshard() -> None:
        module = known()
        for state in _get_fsdp_states(module) if module is not None else []:
            handle = state._handle
            # Gathered by a forward without a backward, and kept: it would be used again.
            if handle is not None and not handle.needs_unshard():
                fsdp1._reshard(state, handle, True)

    why_exact = "FSDP's CPU offload" if offloaded else ""
    return Replicas(root, name_of(root.module), group, shards, handles, reshard, why_exact)


def _shards(root: Any) -> list[Shard]:  # noqa: ANN401
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


def meet(module: FullyShardedDataParallel) -> None:
    """Meet a module now, if it is a root and its first forward is still to come."""
    fsdp1._lazy_init(module, module)  # type: ignore[arg-type]
    if module._is_root and module not in roots:
        _meet(module)


def _meet(root: Any) -> None:  # noqa: ANN401
    roots[root] = replicas = _replicas(root)
    if replicas is not None:
        return
    if root.sharding_strategy == ShardingStrategy.NO_SHARD:
        note_exact(root.module, None, root.process_group)
    else:
        note_exact(root.module, root.process_group, getattr(root, "_inter_node_pg", None))


def _wrap_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of FSDP1's wrapper, which is told here whether it is the root."""

    # Dynamo leaves FSDP's own wrapper alone and compiles what is in it; so with this one.
    @functools.partial(torch.compiler.disable, recursive=False)
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the module's own
        _before_forward(self)
        return original(self, *args, **kwargs)

    return forward


def _before_forward(module: Any) -> None:  # noqa: ANN401
    fsdp1._lazy_init(module, module)
    if not module._is_root:
        return
    if module not in roots:
        _meet(module)
    replicas = roots[module]
    if replicas is not None and torch.is_grad_enabled() and module._sync_gradients:
        replicas.exchange()


def _wrap_reduce_grad(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reduce_grad(state: Any, handle: Any) -> Any:  # noqa: ANN401
        with reducing_of(handle):
            return original(state, handle)

    return reduce_grad


def install() -> None:
    """Wrap what must be wrapped. Once a process."""
    global _before_forward
    _before_forward = torch.compiler.disable(_before_forward)
    forward = FullyShardedDataParallel.forward
    FullyShardedDataParallel.forward = _wrap_forward(forward)  # type: ignore[method-assign]
    fsdp1._reduce_grad = _wrap_reduce_grad(fsdp1._reduce_grad)  # type: ignore[assignment]
