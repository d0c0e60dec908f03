"""``torch-distro doctor`` finds what is wrong, says what to do, and works where torch does not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch_distro._extension as extension
from torch_distro._cli import main


def _doctor(
    *arguments: str, path: Path | None = None, **env: str
) -> tuple[int, dict[str, list[dict[str, str]]], str]:
    """Exit status, findings by check, stderr of the command in a process of its own."""
    environment = {**os.environ, **env}
    if path:
        environment["PYTHONPATH"] = f"{path}{os.pathsep}{environment['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "torch_distro", "doctor", "--json", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    by_check: dict[str, list[dict[str, str]]] = {}
    for finding in json.loads(done.stdout)["findings"]:
        by_check.setdefault(finding["check"], []).append(finding)
    return done.returncode, by_check, done.stderr


def _here(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """The same in this process, without the exchange."""
    status = main(["doctor", "--json", "--no-exchange"])
    report = json.loads(capsys.readouterr().out)
    return status, report


def test_a_sound_installation_passes_with_a_real_exchange() -> None:
    status, found, errors = _doctor()
    assert status == 0, found
    assert {"package", "torch", "adapter", "libzmq", "libsodium", "cpu", "exchange"} <= set(found)
    assert all(finding["level"] != "failed" for check in found.values() for finding in check)
    assert "2 exchanges over tcp" in found["exchange"][0]["found"]
    assert errors == ""


def test_a_missing_torch_is_found_and_the_rest_is_still_checked(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    status, found, errors = _doctor(path=tmp_path, DISTRO_K="6")
    assert status == 1
    assert found["torch"][0]["level"] == "failed"
    assert "pip install 'torch>=2.11" in found["torch"][0]["advice"]
    assert found["adapter"][0]["level"] == "failed"
    assert found["variables"][0]["level"] == "warning"
    assert found["exchange"][0]["level"] == "warning"
    assert found["libzmq"][0]["level"] == "ok"
    assert errors == ""


def test_a_missing_adapter_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "_extension.py"))
    extension.extension.cache_clear()
    status, report = _here(capsys)
    extension.extension.cache_clear()
    assert status == 1
    assert report["status"] == "failed"
    adapter = next(f for f in report["findings"] if f["check"] == "adapter")
    assert adapter["level"] == "failed"
    assert "was built for torch (none)" in adapter["found"]
    assert "reinstall" in adapter["advice"]


def test_each_bad_setting_is_found_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    secret, peers = tmp_path / "secret", tmp_path / "peers"
    secret.write_text("")
    secret.chmod(0o644)
    peers.write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = {
            "DISTRO_K": "0",
            "DISTRO_MODUS": "dense",
            "DISTRO_DELAY": "0",
            "DISTRO_TRANSPORT": "/no/such/lib.so",
            "DISTRO_PORTS": str(taken.getsockname()[1]),
            "DISTRO_ADVERTISE": "no-such-host.invalid",
            "DISTRO_CURVE_SECRET_FILE": str(secret),
            "DISTRO_CURVE_PEERS_FILE": str(peers),
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        }
        for name, text in settings.items():
            monkeypatch.setenv(name, text)
        status, report = _here(capsys)
    assert status == 1
    bad = [f for f in report["findings"] if f["level"] != "ok"]
    assert all(finding["advice"] for finding in bad)
    text = "\n".join(f"{f['check']}: {f['found']}" for f in bad)
    for part in (
        "variables: DISTRO_K=0",
        "variables: DISTRO_MODUS",
        "variables: /no/such/lib.so",
        "ports: 0 of the 1 ports",
        "network: DISTRO_ADVERTISE=no-such-host.invalid",
        "keys: ",
        "entry points: TORCH_DEVICE_BACKEND_AUTOLOAD=0",
    ):
        assert part in text, text
    assert f"chmod 600 {secret}" in text
    assert "DISTRO_DELAY" not in text


@pytest.mark.parametrize(
    ("bind", "insecure", "level"),
    [
        ("lo", "0", "ok"),
        ("0.0.0.0", "0", "failed"),
        ("0.0.0.0", "1", "warning"),
        ("?", "0", "failed"),
    ],
)
def test_an_address_open_to_others_is_told(
    bind: str,
    insecure: str,
    level: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DISTRO_BIND", bind)
    monkeypatch.setenv("DISTRO_INSECURE", insecure)
    _, report = _here(capsys)
    found = next(f for f in report["findings"] if f["check"] == "network")
    assert found["level"] == level, found


def test_text_for_people_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--no-exchange"]) in (0, 1)
    assert "ok       torch" in capsys.readouterr().out
    for arguments in (["bench"], []):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit) as helped:
        main(["doctor", "--help"])
    assert helped.value.code == 0
    assert "--no-exchange" in capsys.readouterr().out
