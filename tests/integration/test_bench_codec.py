"""`torch-distro bench codec`: the rows that are promised, with figures that can be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torch_distro import _cli

PROMISED = {
    "row", "isa", "elements", "threads", "k", "peers", "milliseconds", "memcpy_milliseconds",
    "ratio", "bytes_a_parameter", "floor_bytes_a_parameter",
}  # fmt: skip


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert _cli.main(["bench", "codec", "--json", "--seconds", "0.01", *arguments]) == 0
    result: dict[str, Any] = json.loads(capfd.readouterr().out)
    return result


def test_rows_beside_a_memcpy_and_beside_torch(capfd: pytest.CaptureFixture[str]) -> None:
    result = run(capfd, "--filter", "(weights_sync_one_span|ef_decode_8_peers)/threads")
    rows = {row["row"]: row for row in result["codec"]}
    assert set(rows) >= {"weights_sync_one_span/threads:1", "ef_decode_8_peers/threads:1"}
    for row in rows.values():
        assert set(row) >= PROMISED
        assert row["elements"] == 6553600
        assert row["ratio"] == pytest.approx(row["milliseconds"] / row["memcpy_milliseconds"])
    sync = rows["weights_sync_one_span/threads:1"]
    # Reads x, W and R, writes x and R.
    assert sync["floor_bytes_a_parameter"] == 20
    # No code is shorter than the entropy, and this one not much longer.
    assert sync["entropy_bits_a_tile"] < sync["bits_a_tile"] < 1.1 * sync["entropy_bits_a_tile"]
    torch_rows = {row["row"]: row for row in result["torch"]}
    beside = torch_rows["ef_decode_8_peers/threads:1"]
    ours = rows["ef_decode_8_peers/threads:1"]
    assert beside["times_the_codec"] == pytest.approx(beside["ratio"] / ours["ratio"])
    assert torch_rows["ef_encode/threads:1"]["times_the_codec"] is None  # was filtered out


def test_bad_arguments_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--filter", "("], ["--seconds", "nan"], ["--seconds", "0"]):
        with pytest.raises(SystemExit):
            _cli.main(["bench", "codec", *arguments])
        assert f"argument {arguments[0]}" in capfd.readouterr().err


def test_a_filter_that_nothing_matches(capfd: pytest.CaptureFixture[str]) -> None:
    result = run(capfd, "--filter", "nothing_of_that_name", "--no-torch")
    assert (result["codec"], result["torch"]) == ([], [])
