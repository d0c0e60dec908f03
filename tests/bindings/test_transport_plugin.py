"""A third-party transport, built as its author would build it: the header alone, one library."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch_distro
from models import batches, flat, train, wrapped
from ranks import fail, run

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    installed = Path(torch_distro.__file__).parent / "include"
    include = installed if installed.is_dir() else _ROOT  # a checkout that is not installed
    target = tmp_path_factory.mktemp("transport") / "libexample.so"
    source = _ROOT / "tests/transport/example_transport/example_transport.cpp"
    command = [compiler, "-std=c++17", "-shared", "-fPIC", f"-I{include}", source, "-o", target]
    subprocess.run([str(part) for part in command], check=True, timeout=120)
    return str(target)


def _train(rank: int, size: int) -> tuple[list[int], torch.Tensor, int, int]:
    module = wrapped()
    checksums: list[int] = []
    train(
        module,
        torch.optim.AdamW(module.parameters(), lr=1e-2),
        batches(rank, 20),
        lambda _: checksums.append(torch_distro.stats()["reference_checksum"]),
    )
    torch_distro.average(module)
    stats = torch_distro.stats()
    return checksums, flat(module), stats["payload_bytes_sent"], stats["socket_bytes_sent"]


def test_training_over_a_transport_by_path_equals_training_over_tcp(library: str) -> None:
    tcp = run(3, _train)
    example = run(3, _train, env={"DISTRO_TRANSPORT": library})
    for checksums, weights, payload, carried in example:
        assert checksums == tcp[0][0]
        assert torch.equal(weights, tcp[0][1])
        assert carried > payload > 0


def _nothing(rank: int, size: int) -> bool:
    return True


def _one_differs(rank: int, size: int, path: str, library: str) -> bool:
    torch.distributed.init_process_group(
        "distro",
        init_method=f"file://{path}",
        rank=rank,
        world_size=size,
        pg_options=torch_distro.Options(transport=library if rank == 0 else "tcp"),
    )
    return True


def test_a_transport_that_cannot_be_used_is_named_on_all_ranks(
    library: str, tmp_path: Path
) -> None:
    for error in fail(2, _nothing, env={"DISTRO_TRANSPORT": "/no/such/lib.so"}):
        assert error.kind == "OptionError"
        assert "/no/such/lib.so" in error.message
        assert "docs/transports.md" in error.message
    for error in fail(2, _one_differs, f"{tmp_path}/store", library, backend=None):
        assert error.kind == "DistBackendError"
        assert "transport: rank 0 has example 1.0; rank 1 has tcp" in error.message
