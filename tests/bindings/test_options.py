"""Bad options are errors at start-up; ranks that differ are named."""

from __future__ import annotations

import datetime
import json
import os
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch_distro
from ranks import fail, run


def _nothing(rank: int, size: int) -> bool:
    return True


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"DISTRO_K": "0"}, ["DISTRO_K=0", "1 to 4096"]),
        ({"DISTRO_MODUS": "dense"}, ["DISTRO_MODUS", "DISTRO_MODE"]),
        ({"DISTRO_MODE": "fast"}, ["DISTRO_MODE=fast", "auto, weights, ef, demo, dense"]),
    ],
)
def test_a_bad_variable_is_a_value_error_that_lists_what_is_allowed(
    env: dict[str, str], says: list[str]
) -> None:
    for error in fail(2, _nothing, env=env):
        assert error.kind == "OptionError"
        for part in says:
            assert part in error.message


def _one_bad(rank: int, size: int, path: str) -> bool:
    options = torch_distro.Options(k=0 if rank == 1 else 6)
    dist.init_process_group(
        "distro", init_method=f"file://{path}", rank=rank, world_size=size, pg_options=options
    )
    return True


def test_a_bad_option_on_one_rank_is_named_to_the_others_at_once(tmp_path: Path) -> None:
    errors = fail(3, _one_bad, f"{tmp_path}/store", backend=None, deadline=30)
    assert errors[1].kind == "OptionError"
    for error in (errors[0], errors[2]):
        assert error.kind == "DistBackendError"
        assert "rank 1 cannot start" in error.message
        assert "k" in error.message


def _different(rank: int, size: int, path: str) -> bool:
    options = torch_distro.Options(k=6 + rank // 2, threads=rank + 1)
    dist.init_process_group(
        "distro", init_method=f"file://{path}", rank=rank, world_size=size, pg_options=options
    )
    return True


def test_different_options_are_an_error_on_every_rank_that_names_the_ranks(tmp_path: Path) -> None:
    for error in fail(3, _different, f"{tmp_path}/store", backend=None):
        assert error.kind == "DistBackendError"
        assert "k: ranks 0, 1 have 6; rank 2 has 7" in error.message
        assert "threads" not in error.message


def _foreign(rank: int, size: int, path: str) -> bool:
    dist.init_process_group(
        "distro",
        init_method=f"file://{path}",
        rank=rank,
        world_size=size,
        pg_options=dist.ProcessGroupGloo._Options(),  # type: ignore[attr-defined]
    )
    return True


def test_options_of_another_backend_are_refused(tmp_path: Path) -> None:
    assert "torch_distro.Options" in fail(1, _foreign, f"{tmp_path}/store", backend=None)[0].message


def _beyond_loopback(rank: int, size: int) -> bool:
    return True


def test_binding_beyond_loopback_is_refused_with_the_way_out() -> None:
    errors = fail(
        2, _beyond_loopback, env={"DISTRO_BIND": "0.0.0.0", "DISTRO_ADVERTISE": "127.0.0.1"}
    )
    assert any("DISTRO_INSECURE=1" in error.message for error in errors)


def _on_every_address(rank: int, size: int, port: int) -> str:
    from torch_distro import _backend

    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    backend = _backend.create(
        types.SimpleNamespace(
            store=store,
            group_rank=rank,
            group_size=size,
            global_ranks_in_group=[],
            timeout=datetime.timedelta(seconds=20),
        )
    )
    tensor = torch.ones(3)
    backend.allreduce([tensor]).wait()
    assert tensor.tolist() == [2.0] * 3
    meeting = store.get("distro/round").decode()
    told = json.loads(store.get(f"distro/{meeting}/address/{rank}"))["endpoint"]
    backend.shutdown()
    return str(told)


def test_who_listens_on_every_address_tells_the_one_on_its_way_to_the_store() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"DISTRO_BIND": "0.0.0.0", "DISTRO_INSECURE": "1"}
    for told in run(2, _on_every_address, store.port, backend=None, env=env):
        assert told.startswith("tcp://127.0.0.1:")


def test_option_errors_are_value_errors() -> None:
    from torch_distro._extension import extension

    assert issubclass(extension().OptionError, ValueError)
    with pytest.raises(ValueError, match="Allowed"):
        extension().check_options({"DISTRO_DELAY": "2"}, {})
    options = torch_distro.Options(
        mode="ef", beta=0.95, reduce_scatter="compress", transform="none"
    )
    agreed = extension().check_options({"DISTRO_MIN_ELEMENTS": "9"}, options.overrides())
    assert agreed["beta"] == "0.95"
    assert agreed["min_elements"] == "9"
    with pytest.raises(ValueError, match=r"Options\(beta\) means nothing in mode weights"):
        extension().check_options({"DISTRO_MODE": "weights"}, {"beta": "0.95"})
    with pytest.raises(TypeError):
        torch_distro.Options(6)  # type: ignore[misc]


def test_a_variable_that_is_no_text_is_named() -> None:
    for error in fail(2, _nothing, env={"DISTRO_ADVERTISE": os.fsdecode(b"h\xffst")}):
        assert error.kind == "OptionError"
        assert "DISTRO_ADVERTISE=h\ufffdst is not UTF-8" in error.message


@pytest.mark.parametrize(
    ("path", "says"),
    [("folder", "it is a folder"), ("file/stats.json", "is not a folder"), ("new/", "a folder")],
)
def test_a_path_of_stats_that_cannot_be_written_is_found_at_start(
    path: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for error in fail(2, _nothing, env={"DISTRO_STATS": f"{tmp_path}/{path}"}):
        assert error.kind == "OptionError"
        assert "DISTRO_STATS=" in error.message
        assert says in error.message
