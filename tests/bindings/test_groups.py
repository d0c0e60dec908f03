"""Groups made every way that torch knows: meshes, splits, backend strings, stores, two agents."""

from __future__ import annotations

import datetime
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_distro
from ranks import MINOR, run


def _sum_of(group: Any) -> float:  # noqa: ANN401
    x = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(x, group=group)
    return x.item()


def _meshes(rank: int, size: int) -> bool:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    assert dist.get_backend(mesh.get_group("rows")) == "distro"
    assert _sum_of(mesh.get_group("columns")) == (1 if rank < 2 else 5)
    assert _sum_of(mesh.get_group("rows")) == (2 if rank % 2 == 0 else 4)
    assert _sum_of(dist.new_group(backend="distro")) == 6
    if rank in (1, 3):
        assert _sum_of(dist.new_group([1, 3], use_local_synchronization=True)) == 4
    return True


def test_meshes_and_groups_of_some_ranks() -> None:
    run(4, _meshes)


def _meshes_and_splits(rank: int, size: int, path: str) -> bool:
    dist.init_process_group(
        "distro",
        store=dist.FileStore(path, size),
        rank=rank,
        world_size=size,
        device_id=torch.device("cpu:0"),
        pg_options=torch_distro.Options(k=7),
        timeout=datetime.timedelta(seconds=50),
    )
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    assert dist.get_backend(mesh.get_group("rows")) == "distro"
    assert _sum_of(mesh.get_group("columns")) == (1 if rank < 2 else 5)
    assert _sum_of(mesh.get_group("rows")) == (2 if rank % 2 == 0 else 4)
    halves: Any = dist.split_group(
        split_ranks=[[0, 2], [1, 3]], timeout=datetime.timedelta(seconds=40), group_desc="halves"
    )
    assert _sum_of(halves) == (2 if rank % 2 == 0 else 4)
    child: Any = halves._get_backend(torch.device("cpu"))
    assert child.options.overrides == {"k": "7"}
    assert child.options._timeout == datetime.timedelta(seconds=40)
    assert child.group.stats()["world_size"] == 2
    assert halves.group_desc == "halves"
    assert halves._get_backend(torch.device("cuda")) is child  # one object, met once
    assert _sum_of(dist.new_group(backend="distro")) == 6
    # Last: torch counts groups on their members only, and names later ones by the count.
    some: Any = dist.split_group(split_ranks=[[1, 3]])
    assert (rank in (1, 3)) == isinstance(some, dist.ProcessGroup)
    if rank in (1, 3):
        assert _sum_of(some) == 4
        assert _sum_of(dist.new_group([1, 3], use_local_synchronization=True)) == 4
    return True


@pytest.mark.skipif(MINOR < (2, 15), reason="torch splits groups of accelerators only")
def test_meshes_and_split_groups(tmp_path: Path) -> None:
    run(4, _meshes_and_splits, str(tmp_path / "store"), backend=None)


def _strings(rank: int, size: int, path: str) -> bool:
    for number, backend in enumerate(["cpu:gloo,cuda:distro", "cpu:distro,cuda:gloo"]):
        store = dist.FileStore(f"{path}{number}", size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        assert _sum_of(None) == 1
        dist.destroy_process_group()
    return True


def test_backend_strings_with_a_backend_for_each_device(tmp_path: Path) -> None:
    run(2, _strings, str(tmp_path / "store"), backend=None)


SCRIPT = """
import sys, torch, torch.distributed as dist
dist.init_process_group("distro")
x = torch.tensor([1.0 + dist.get_rank()])
dist.all_reduce(x)
assert x.item() == 3.0, x
dist.destroy_process_group()
print("done")
"""


def _port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_two_agents_of_torchrun_make_one_group(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    address = ["--master-addr=127.0.0.1", f"--master-port={_port()}"]
    agents = [
        subprocess.Popen(
            [*launcher, *address, f"--node-rank={node}", str(script)],
            env=os.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    try:
        for agent in agents:
            out, err = agent.communicate(timeout=100)
            assert agent.returncode == 0, err
            assert out.count("done") == 1
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()


def _by_url(rank: int, size: int, url: str) -> bool:
    dist.init_process_group("distro", init_method=url, rank=rank, world_size=size)
    return _sum_of(None) == 1


def test_tcp_and_file_stores(tmp_path: Path) -> None:
    for url in (f"tcp://127.0.0.1:{_port()}", f"file://{tmp_path}/store"):
        assert run(2, _by_url, url, backend=None) == [True, True]
