"""What a script can do with its modules beyond training them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from torch_distro._attach import owners_of
from torch_distro._attachment import Attachment
from torch_distro._sharded import meet


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
    owners = owners_of(module)
    for owner in owners:
        if not owner.average():
            _exact_mean(module, owner.process_group)
    if not owners and dist.is_available() and dist.is_initialized():
        group = getattr(module, "process_group", None) or dist.group.WORLD
        assert group is not None
        _exact_mean(module, group)


@contextlib.contextmanager
def reference(module: nn.Module) -> Iterator[None]:
    """Evaluate or save the weights that all ranks have in common, instead of this rank's own.

    The reference W holds what the ranks have sent each other so far: the same bits on every rank
    that has made the same exchanges. In a long run it is as good as the mean that :func:`average`
    makes (docs/algorithm.md), and it costs no communication, so that one rank may look at it
    alone. Within the ``with`` the parameters are W; after it they are what they were.

    Args:
        module: the DDP module, or the root of hybrid sharding, in weights mode, not within a
            training forward or backward. A module that is not in weights mode, or has not begun to
            train, stays as it is.

    Raises:
        RuntimeError: a training forward, :func:`average` or :func:`state_dict` inside.
    """
    with contextlib.ExitStack() as stack:
        for owner in owners_of(module):
            if owner.exchanged:
                stack.enter_context(owner.reference())
        yield


def _exact_mean(module: nn.Module, group: dist.ProcessGroup) -> None:
    with torch.no_grad():
        for parameter, groups in _copies(module, group):
            for copies in groups:
                half = parameter.dtype in (torch.float16, torch.bfloat16)
                mean = parameter.float() if half else parameter.clone()
                dist.all_reduce(mean, group=copies)
                parameter.copy_(mean / dist.get_world_size(copies))


def _copies(
    module: nn.Module, group: dist.ProcessGroup
) -> Iterator[tuple[torch.Tensor, list[dist.ProcessGroup]]]:
    """What this rank holds of each parameter, and the groups over which others hold the same.

    Those of a parameter that is not sharded are `group`.
    """
    parts = module.modules()
    sharded = [part for part in parts if isinstance(part, FullyShardedDataParallel)]
    flat = {id(parameter) for part in sharded for parameter in part.parameters()}
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            replicated = [
                i for i, placed in enumerate(parameter.placements) if placed.is_replicate()
            ]
            yield parameter.to_local(), [mesh.get_group(i) for i in replicated]
        elif id(parameter) not in flat:  # FSDP1 keeps copies equal
            yield parameter, [group]


def resync(module: nn.Module) -> None:
    """Ask for a resync: this rank has edited the weights.

    All ranks take the exact mean at their next exchange. Not a collective: one rank may call it
    alone. ``load_state_dict`` asks by itself.

    Args:
        module: the DDP module, the module in it, or a part of that.

    Raises:
        ValueError: the module is not wrapped on a distro group.
    """
    exchanged = [owner for owner in owners_of(module) if owner.exchanged]
    if not exchanged:
        raise ValueError(_NOT_EXCHANGED)
    for owner in exchanged:
        owner.synchroniser.mark()


_WRAP = (
    "wrap it in DistributedDataParallel on a distro group, or shard it there in replicas (hybrid "
    "sharding)"
)
_NOT_EXCHANGED = f"this module is not in weights mode: {_WRAP}"
# What a state has of each parameter.
_PARTS = {"reference", "residual", "pending"}

_NO_STATE = f"this module is not compressed, and so there is nothing to save: {_WRAP}"


def _owner_of(module: nn.Module) -> Attachment:
    meet(module)  # or a sharded one would be met at its first forward only
    owners = [owner for owner in owners_of(module) if owner.exchanged or owner.gradients]
    if not owners:
        raise ValueError(_NO_STATE)
    if len(owners) > 1:
        raise ValueError("this module holds several wrapped modules; give one of them")
    return owners[0]


def state_dict(module: nn.Module) -> dict[str, Any]:
    """The exchange's state of this rank.

    It is what a per-rank resume needs beside the script's own checkpoint: that one, usually rank
    0's, knows nothing of what the other ranks have moved and not sent yet. Save this on every rank,
    at the same step, in a file of its own.

    Args:
        module: a DDP module in mode weights, ef or demo; in the latter two not while a backward
            runs. Or the root of hybrid sharding in mode weights: the state is then of this rank's
            shards, on one line each where FSDP1 has them so. Not a collective.

    Returns:
        In weights mode ``reference`` and ``residual`` (W and R by parameter name, fp32, in the
        parameters' shapes; R holds an exchange in flight, too), ``exchanges`` (count), ``share``
        (weights are W + share * R), ``mean_at`` (exchanges when all took the mean last); where
        a gain has been spread (Options.spread) also ``pending`` (P, of which W is ahead: weights
        are W - P + share * R). In modes ef and demo ``residual`` (what was not sent of the
        gradients by parameter name, fp32, flat; only of parameters that were compressed),
        ``exchanges``, ``mode`` and ``transform``.

    Raises:
        ValueError: the module is in none of these modes.
    """
    attachment = _owner_of(module)
    if attachment.gradients:
        return _gradient_state(attachment)
    attachment.settle()
    state = attachment.synchroniser.state()
    for part in _PARTS & state.keys():
        shaped = zip(attachment.names, state[part], attachment.shapes, strict=True)
        state[part] = {name: flat.reshape(shape) for name, flat, shape in shaped}
    return state


def load_state_dict(module: nn.Module, state: dict[str, Any]) -> None:
    """Take up what :func:`state_dict` gave.

    In weights mode it leaves the weights at W + share * R; in modes ef and demo they are the
    script's to load.

    Args:
        module: the same DDP module, wrapped again, before its first training forward. On every
            rank, or on none.
        state: this rank's own, saved at the same step as the others'.

    Raises:
        ValueError: the module is in another mode than when the state was saved, or the state has
            other parameters.
        torch.distributed.DistBackendError: the module has begun to train, or shapes differ.
    """
    attachment = _owner_of(module)
    mode = attachment.record["mode"]
    if state.get("mode", "weights") != mode:
        raise ValueError(
            f"the state is of mode {state.get('mode', 'weights')} and the module in mode {mode}"
        )
    if attachment.gradients:
        _load_gradient_state(attachment, state)
        return
    for part in {"reference", "residual"} | (_PARTS & state.keys()):
        if set(state[part]) != set(attachment.names):
            differing = sorted(set(state[part]) ^ set(attachment.names))
            raise ValueError(
                f"the state has other parameters than the module: {', '.join(differing)}"
            )
    attachment.settle()
    attachment.synchroniser.load(
        [state["reference"][name] for name in attachment.names],
        [state["residual"][name] for name in attachment.names],
        [state.get("pending", {}).get(name, torch.empty(0)) for name in attachment.names],
        state["exchanges"],
        state["share"],
        state["mean_at"],
    )


def _gradient_state(attachment: Attachment) -> dict[str, Any]:
    residuals = zip(attachment.names, attachment.gradients.residuals(), strict=True)
    return {
        "residual": {name: residual for name, residual in residuals if residual is not None},
        "exchanges": attachment.gradients.backwards,
        "mode": attachment.group.mode,
        "transform": attachment.group.transform,
    }


def _load_gradient_state(attachment: Attachment, state: dict[str, Any]) -> None:
    transform = attachment.group.transform
    if state["transform"] != transform:
        raise ValueError(
            f"the state was saved with transform={state['transform']!r}, which says what its "
            f"residuals mean; the group has {transform!r}"
        )
    if unknown := sorted(set(state["residual"]) - set(attachment.names)):
        raise ValueError(f"the state has other parameters than the module: {', '.join(unknown)}")
    residuals = [state["residual"].get(name) for name in attachment.names]
    attachment.gradients.load(residuals, state["exchanges"])
