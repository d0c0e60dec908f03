"""Groups by name: made and destroyed, again and again, several at once."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import launch, run


def _by_name(rank: int, size: int) -> bool:
    assert "torch_distro" not in sys.modules or dist.is_initialized()
    assert dist.get_backend() == "distro"
    x = torch.ones(3)
    dist.all_reduce(x)
    return x.tolist() == [size] * 3


def test_the_backend_is_found_by_its_name_without_an_import() -> None:
    assert run(2, _by_name) == [True, True]


def test_detail_debugging_wraps_the_backend() -> None:
    assert run(2, _by_name, env={"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}) == [True, True]


def _weights_under_detail(rank: int, size: int) -> str:
    import torch_distro
    from models import batches, train, wrapped

    module = wrapped()
    train(module, torch.optim.AdamW(module.parameters()), batches(rank, 3))
    return torch_distro.stats()["modules"][0]["mode"]


def test_weights_mode_works_under_detail_debugging() -> None:
    assert (
        run(2, _weights_under_detail, env={"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}) == ["weights"] * 2
    )


def _several(rank: int, size: int) -> bool:
    pairs = [dist.new_group([0, 1], backend="distro"), dist.new_group([1, 2], backend="distro")]
    alone = [dist.new_group([r], backend="distro") for r in range(size)]
    everyone = dist.new_group(backend="distro")
    groups: list[Any] = [*pairs, *alone, everyone]  # a marker where this rank is no member
    for _ in range(3):
        for group in groups:
            if dist.get_rank(group) >= 0:
                x = torch.ones(2)
                dist.all_reduce(x, group=group)
                assert x.tolist() == [dist.get_world_size(group)] * 2
    return True


def test_several_groups_at_once_also_of_one_rank() -> None:
    assert run(3, _several) == [True] * 3


def _one(rank: int, size: int) -> list[str]:
    import torch_distro
    from models import batches, train, wrapped

    module = wrapped()
    train(module, torch.optim.AdamW(module.parameters()), batches(rank, 3))
    torch_distro.average(module)
    return [entry["reason"] for entry in torch_distro.stats()["modules"]]


def test_a_group_of_one_rank_trains() -> None:
    assert run(1, _one) == [["one rank"]]


class Held(NamedTuple):
    """What this process holds."""

    files: int
    threads: int
    mebibytes: float


def _held() -> Held:
    gc.collect()
    status = Path("/proc/self/status").read_text()
    kibibytes = int(status.split("VmRSS:")[1].split()[0])
    files, threads = os.listdir("/proc/self/fd"), os.listdir("/proc/self/task")
    return Held(len(files), len(threads), kibibytes / 1024)


def _train_a_module() -> None:
    from models import batches, train, wrapped

    module = wrapped()
    train(module, torch.optim.AdamW(module.parameters()), batches(dist.get_rank(), 2))


def _cycles(rank: int, size: int, folder: str) -> list[Held]:
    held = []
    for cycle in range(50):
        store = dist.FileStore(f"{folder}/store{cycle}", size)
        dist.init_process_group("distro", store=store, rank=rank, world_size=size)
        dist.all_reduce(torch.ones(2))
        if cycle % 5 == 0:
            _train_a_module()
        dist.destroy_process_group()
        del store
        held.append(_held())
    return held


def _assert_no_growth(before: Held, after: Held) -> None:
    assert after.files <= before.files + 1, (before, after)
    assert after.threads <= before.threads + 1, (before, after)
    assert after.mebibytes <= before.mebibytes + 8, (before, after)


def test_start_and_destroy_again_and_again_leaks_nothing(tmp_path: Path) -> None:
    for held in run(2, _cycles, str(tmp_path), backend=None):
        _assert_no_growth(held[14], held[-1])


def _twenty_groups(rank: int, size: int) -> list[Held]:
    held = []
    for _ in range(4):
        groups: list[Any] = [dist.new_group(backend="distro") for _ in range(20)]
        for group in groups:
            dist.all_reduce(torch.ones(2), group=group)
        for group in groups:
            dist.destroy_process_group(group)
        del groups, group
        held.append(_held())
    return held


def test_twenty_groups_made_and_destroyed_leak_nothing() -> None:
    for held in run(2, _twenty_groups):
        _assert_no_growth(held[1], held[-1])


def _killed_with_a_socket(rank: int, size: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_folder_of_a_killed_rank_is_removed_by_the_next_start() -> None:
    folder = tempfile.mkdtemp(prefix="r")  # a socket's path is short
    environment = {"XDG_RUNTIME_DIR": folder}
    ipc = {"transport": "ipc"}
    launch(2, _killed_with_a_socket, env=environment, options=ipc)
    assert len(os.listdir(folder)) >= 1
    assert run(2, _by_name, env=environment, options=ipc) == [True, True]
    assert os.listdir(folder) == []
    os.rmdir(folder)


def _script(
    body: str, tmp_path: Path, ranks: int = 2, **env: str
) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(body)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            str(path),
        ],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


FORGETFUL = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("distro")
module = DistributedDataParallel(torch.nn.Linear(100, 100))
optimizer = torch.optim.AdamW(module.parameters())
for _ in range(4):
    module(torch.randn(3, 100)).square().mean().backward()
    optimizer.step()
"""


def test_a_script_that_forgets_to_destroy_its_group_ends_cleanly_and_writes_its_stats(
    tmp_path: Path,
) -> None:
    import json

    for _ in range(3):
        done = _script(FORGETFUL, tmp_path, DISTRO_STATS=str(tmp_path / "stats.json"))
        assert done.returncode == 0, done.stderr
        assert "terminate" not in done.stderr
    written = [json.loads((tmp_path / f"stats.rank{rank}.json").read_text()) for rank in range(2)]
    assert [stats["exchanges"] for stats in written] == [3, 3]
    assert written[0]["reference_checksum"] == written[1]["reference_checksum"]
    assert written[0]["modules"][0]["name"] == "Linear"


def test_stats_that_cannot_be_written_any_more_are_told_at_exit(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    body = FORGETFUL + "import pathlib, shutil\nif dist.get_rank() == 0:\n"
    body += (
        f"    shutil.rmtree({str(folder)!r})\n    pathlib.Path({str(folder)!r}).write_text('')\n"
    )
    folder.mkdir()
    done = _script(body, tmp_path, DISTRO_STATS=str(folder / "stats.json"))
    assert done.returncode == 0, done.stderr
    assert "counters of rank 0 (DISTRO_STATS) cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


AGAIN = (
    FORGETFUL.replace("dist.init_process_group", "for _ in range(3):\n  dist.init_process_group")
    .replace("\nmodule", "\n  module")
    .replace("\noptimizer", "\n  optimizer")
    .replace("\nfor _ in range(4):\n    module", "\n  for _ in range(4):\n    module")
    + "  dist.destroy_process_group()\nprint('done')\n"
)


def test_start_and_destroy_again_on_the_launchers_own_store(tmp_path: Path) -> None:
    done = _script(AGAIN, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2


def test_stats_name_the_modules_of_a_script_whose_model_lives_in_a_function(
    tmp_path: Path,
) -> None:
    import json

    body = (
        FORGETFUL.split("dist.init_process_group")[0] + "def main():\n    dist.init_process_group"
    )
    body += FORGETFUL.split("dist.init_process_group")[1].replace("\n", "\n    ") + "\nmain()\n"
    done = _script(body, tmp_path, DISTRO_STATS=str(tmp_path / "stats.json"))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "stats.rank0.json").read_text())
    assert written["modules"][0] == {
        "name": "Linear",
        "mode": "weights",
        "reason": "DDP, 10100 trainable parameters, 2 participants",
        "exchanges": 3,
    }


CONTRACT = [
    "exchanges", "reductions", "exact", "gradient_bytes",
    "payload_bytes_sent", "payload_bytes_received", "socket_bytes_sent", "socket_bytes_received",
    "exact_bytes", "encode_seconds", "decode_seconds", "wait_seconds",
    "resent_frames", "reconnects", "resyncs", "participants", "reference_checksum", "modules",
]  # fmt: skip


def _stats(rank: int, size: int) -> dict[str, Any]:
    import torch_distro
    from models import batches, train, wrapped

    module = wrapped()
    train(module, torch.optim.AdamW(module.parameters()), batches(rank, 6))
    torch_distro.average(module)  # brings the counters to rest
    return torch_distro.stats()


def test_stats_have_what_the_contract_names_and_bytes_agree_between_ranks() -> None:
    first, second = run(2, _stats)
    assert set(CONTRACT) <= set(first)
    assert first["gradient_bytes"] == 5 * 4 * (
        20 * 250 + 250 + 250 * 20 + 20 + 20 + 20 + 1 + 20 * 20
    )
    assert first["payload_bytes_sent"] == second["payload_bytes_received"]
    assert first["socket_bytes_sent"] > first["payload_bytes_sent"]
    assert threading.active_count() >= 1


@pytest.mark.parametrize("start_method", ["fork"])
def test_a_forked_data_loader_does_not_touch_the_sockets(start_method: str, tmp_path: Path) -> None:
    done = _script(
        FORGETFUL.replace("for _ in range(4):", f"""
loader = torch.utils.data.DataLoader(
    list(range(8)), num_workers=2, multiprocessing_context={start_method!r}
)
for _ in loader:""").replace("optimizer.step()\n", "optimizer.step()\n    print('done')\n"),
        tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 16
