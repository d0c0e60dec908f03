"""Keys (DISTRO_CURVE_SECRET_FILE, DISTRO_CURVE_PEERS_FILE) and the command that makes them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_distro
from models import adamw, batches, flat, train, wrapped
from ranks import fail, run
from torch_distro._cli import main


def keygen(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch_distro", "keygen", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def keys(folder: Path, ranks: int) -> list[dict[str, str]]:
    """Environments by rank of a group with new keys."""
    made = keygen("--ranks", ranks, "--out", folder)
    assert made.returncode == 0, made.stderr
    return [environment(folder, rank) for rank in range(ranks)]


def environment(folder: Path, rank: int) -> dict[str, str]:
    return {
        "DISTRO_CURVE_SECRET_FILE": str(folder / f"rank{rank}.key"),
        "DISTRO_CURVE_PEERS_FILE": str(folder / "peers.txt"),
    }


def _train(rank: int, size: int) -> dict[str, Any]:
    module = wrapped()
    losses = train(module, adamw(module), batches(rank, 8))
    torch_distro.average(module)
    return {"losses": losses, "weights": flat(module), "stats": torch_distro.stats()}


def test_an_unchanged_script_trains_with_keys_as_without(tmp_path: Path) -> None:
    with_keys = run(3, _train, env=keys(tmp_path, 3))
    without = run(3, _train, options={"exact": "transport"})  # as with keys
    for ours, plain in zip(with_keys, without, strict=True):
        assert torch.equal(ours["weights"], plain["weights"])
        assert ours["losses"] == plain["losses"]
        assert ours["stats"]["exchanges"] == plain["stats"]["exchanges"] > 0
        assert ours["stats"]["rejected_connections"] == 0
        assert ours["stats"]["rejected_frames"] == 0


def _exchange_in_groups(rank: int, size: int) -> list[float]:
    """In a group of the higher ranks, in reverse, and in one that is split off."""
    group = dist.new_group([2, 1])
    results = []
    if rank > 0:
        module = torch.nn.parallel.DistributedDataParallel(
            torch.nn.Linear(64, 64), process_group=group
        )
        optimizer = torch.optim.AdamW(module.parameters())
        for _ in range(4):
            module(torch.ones(2, 64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        stats = torch_distro.stats(group)
        assert stats["exchanges"] > 0
        assert stats["rejected_connections"] == 0
        results.append(float(stats["world_size"]))
        dist.destroy_process_group(group)
    return results


def test_groups_of_some_ranks_use_the_keys_of_the_worlds_ranks(tmp_path: Path) -> None:
    assert run(3, _exchange_in_groups, env=keys(tmp_path, 3)) == [[], [2.0], [2.0]]


def _nothing(rank: int, size: int) -> None:
    raise AssertionError("the group was made")


def _all_fail(env: Sequence[dict[str, str]], *parts: str) -> None:
    for error in fail(len(env), _nothing, env=env, timeout=20):
        assert error.kind in ("DistBackendError", "ValueError", "OptionError"), error
        for part in parts:
            assert part in error.message, error.message


def test_peers_files_that_differ_are_an_error_on_every_rank(tmp_path: Path) -> None:
    keys(tmp_path / "a", 3)
    keys(tmp_path / "b", 3)
    env = [environment(tmp_path / "a", rank) for rank in range(3)]
    env[1] = environment(tmp_path / "b", 1)
    _all_fail(env, "the ranks' keys do not agree", "Find out which is right")


def test_another_ranks_key_is_an_error_on_every_rank(tmp_path: Path) -> None:
    env = keys(tmp_path, 2)
    env[1]["DISTRO_CURVE_SECRET_FILE"] = env[0]["DISTRO_CURVE_SECRET_FILE"]
    _all_fail(env, "rank 1: the key in", "is another than that of rank 1")


def test_a_rank_without_keys_is_named_on_every_rank(tmp_path: Path) -> None:
    env = keys(tmp_path, 2)
    env[1] = {}
    _all_fail(env, "keys: rank 1 has 0; rank 0 has 1")


def test_a_key_that_others_can_read_is_refused_and_never_shown(tmp_path: Path) -> None:
    env = keys(tmp_path, 2)
    secret = Path(env[0]["DISTRO_CURVE_SECRET_FILE"])
    secret.chmod(0o644)
    text = secret.read_text().split("secret ")[1].strip()
    for error in fail(2, _nothing, env=env, timeout=20):
        assert f"chmod 600 {secret}" in error.message
        assert text not in str(error)


def test_half_of_the_variables_is_an_error(tmp_path: Path) -> None:
    env = keys(tmp_path, 2)
    for variables in env:
        del variables["DISTRO_CURVE_PEERS_FILE"]
    _all_fail(env, "DISTRO_CURVE_PEERS_FILE is not")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_keygen_makes_files_that_only_the_user_can_read(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    made = keygen(
        *("--ranks", 2, "--relay", "--out", folder, "--json"),
        *("--endpoint", "1=tcp://example.org", "--endpoint", "relay=tcp://[2001:db8::1]:7000"),
    )
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    assert [entry["who"] for entry in report["participants"]] == ["0", "1", "relay"]
    assert _mode(folder) == 0o700
    for entry in report["participants"]:
        secret = Path(entry["secret_file"])
        assert _mode(secret) == 0o600
        assert secret.read_text().split("secret ")[1].strip() not in made.stdout + made.stderr
        assert f"public {entry['public_key']}\n" in secret.read_text()
    lines = [line for line in Path(report["peers_file"]).read_text().splitlines() if line[0] != "#"]
    assert lines == [
        f"0 {report['participants'][0]['public_key']}",
        f"1 {report['participants'][1]['public_key']} tcp://example.org",
        f"relay {report['participants'][2]['public_key']} tcp://[2001:db8::1]:7000",
    ]


def test_keygen_replaces_a_key_only_when_told_to(tmp_path: Path) -> None:
    keys(tmp_path, 1)
    before = (tmp_path / "rank0.key").read_text()
    (tmp_path / "peers.txt").unlink()
    again = keygen("--ranks", 2, "--out", tmp_path)
    assert again.returncode == 1
    assert "--force" in again.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank0.key"]  # nothing by halves
    assert keygen("--ranks", 2, "--out", tmp_path, "--force").returncode == 0
    assert (tmp_path / "rank0.key").read_text() != before


def test_one_makes_his_own_key_and_sends_the_line(tmp_path: Path) -> None:
    lines = []
    for rank in range(2):
        made = keygen("--single", rank, "--out", tmp_path)
        assert made.returncode == 0, made.stderr
        assert made.stdout.startswith(f"{rank} ")
        lines.append(made.stdout)
    (tmp_path / "peers.txt").write_text("".join(lines))
    assert len(run(2, _train, env=[environment(tmp_path, rank) for rank in range(2)])) == 2


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        ([], 2, "--ranks or --single"),
        (["--ranks", "0"], 2, "--ranks"),
        (["--ranks", "2", "--single", "1"], 2, "excludes"),
        (["--single", "rank1"], 1, "number of a rank"),
        (["--ranks", "2", "--endpoint", "2=tcp://a"], 1, "2=tcp://a"),
        (["--ranks", "2", "--endpoint", "1=a:1"], 1, "1=a:1"),
        (["--ranks", "2", "--endpoint", "relay=tcp://a:1"], 1, "--relay"),
        (["--ranks", "2", "--wrong"], 2, "--wrong"),
        (["--ranks", "1", "--out", "/proc/none"], 1, "/proc/none"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: list[str], status: int, part: str, tmp_path: Path
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "new")]
    made = keygen(*arguments, *out)
    assert (made.returncode, made.stdout) == (status, "")
    assert part in made.stderr
    assert not (tmp_path / "new" / "peers.txt").exists()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    made = keygen("--help")
    assert made.returncode == 0
    assert "Usage: torch-distro keygen" in made.stdout
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "keygen" in capsys.readouterr().out


def test_without_the_program_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch_distro._cli.__file__", str(tmp_path / "_cli.py"))
    with pytest.raises(SystemExit, match="reinstall"):
        main(["keygen"])


def test_the_doctor_looks_at_the_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    env = keys(tmp_path, 2)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)

    def finding() -> dict[str, str]:
        main(["doctor", "--no-exchange", "--json"])
        findings = json.loads(capsys.readouterr().out)["findings"]
        assert not [f for f in findings if f["check"] == "variables" and f["level"] != "ok"]
        return next(f for f in findings if f["check"] == "keys")

    for name, text in env[1].items():
        monkeypatch.setenv(name, text)
    assert finding()["level"] == "ok"
    assert "is the key of rank 1" in finding()["found"]
    monkeypatch.setenv("RANK", "0")
    assert "this is rank 0" in finding()["found"]
    monkeypatch.delenv("RANK")
    os.chmod(env[1]["DISTRO_CURVE_SECRET_FILE"], 0o640)
    assert "chmod 600" in finding()["found"]
    os.chmod(env[1]["DISTRO_CURVE_SECRET_FILE"], 0o600)
    keys(tmp_path / "other", 2)
    monkeypatch.setenv("DISTRO_CURVE_PEERS_FILE", str(tmp_path / "other" / "peers.txt"))
    assert "no line of" in finding()["found"]
