"""Which devices a rank has, and which modules may be exchanged on them; needs none of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch_distro import _attachment, _inner


def test_gpus_are_named_by_what_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _inner.devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 3")
    assert _inner.devices() == ["5", "3"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert _inner.devices() == []
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert _inner.devices() == []


def _module(*devices: str) -> DistributedDataParallel:
    """What is asked of a wrapper; parameters on devices that this machine does not have."""
    parameters = [
        SimpleNamespace(
            device=torch.device(device),
            requires_grad=True,
            dtype=torch.float32,
            layout=torch.strided,
        )
        for device in devices
    ]
    names = [f"layer{i}.weight" for i in range(len(devices))]
    inner = SimpleNamespace(named_parameters=lambda: zip(names, parameters, strict=True))
    return cast(DistributedDataParallel, SimpleNamespace(module=inner))


def test_a_module_on_one_device_is_exchanged_and_one_spread_over_devices_is_exact() -> None:
    group: Any = SimpleNamespace(
        world_size=2, sites=[[0], [1]], exchanges_gradients=False, mode="auto"
    )
    assert _attachment._why_exact(_module("cuda:1", "cuda:1"), group) == ""
    assert _attachment._why_exact(_module("cpu", "cpu"), group) == ""
    spread = _attachment._why_exact(_module("cuda:0", "cuda:0", "cuda:1"), group)
    assert spread == "layer0.weight is on cuda:0 and layer2.weight on cuda:1"
    assert "neither" in _attachment._why_exact(_module("meta"), group)
