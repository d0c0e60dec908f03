"""`torch-distro bench wan`: its rows have the fields that are promised, and what they say is so."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from torch_distro import _cli
from torch_distro._wan import bench, internet, models

REASON = internet.unavailable()
emulated = pytest.mark.skipif(bool(REASON), reason=REASON)
PROMISED = {
    "backend", "topology", "delay", "ranks", "link", "rtt_ms", "loss", "model",
    "step_seconds_median", "measured",
}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert _cli.main(["bench", "wan", "--json", *arguments]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["results"]
    assert all(set(row) >= PROMISED for row in rows)
    return rows


@emulated
def test_measured_and_computed_rows(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(
        capsys,
        *("--links", "20/10", "--rtt", "20", "--loss", "1", "--ranks", "2", "--delays", "1"),
        *("--backends", "compute", "gloo", "distro", "--topologies", "mesh", "hub"),
        *("--measure-seconds", "2"),
    )
    compute, gloo, *distro = rows
    assert [row["backend"] for row in rows] == ["compute", "gloo", "distro", "distro"]
    assert [row["measured"] for row in rows] == [True, False, True, True]
    assert compute["bytes_up_a_step"] == [0, 0]
    # All gradients once to the other rank, at 10 Mbit/s.
    assert gloo["bytes_up_a_step"] == [4 * bench.WEIGHTS["quickstart"]] * 2
    transfer = 4 * bench.WEIGHTS["quickstart"] * 8 / 10e6
    assert gloo["step_seconds_median"] == pytest.approx(compute["step_seconds_median"] + transfer)
    assert [row["topology"] for row in distro] == ["mesh", "hub"]
    for row in distro:
        assert 0 < max(row["bytes_up_a_step"]) < gloo["bytes_up_a_step"][0] / 100
        assert row["step_seconds_median"] < gloo["step_seconds_median"]
        assert row["loss"] == 1


@emulated
def test_powersgd_over_gloo_is_measured_and_pinged_beside(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (row,) = run(
        capsys,
        *("--rtt", "4", "--backends", "powersgd", "--measure-seconds", "2", "--ping"),
    )
    assert row["measured"]
    # Vectors of rank 1 instead of matrices.
    assert max(row["bytes_up_a_step"]) < 4 * bench.WEIGHTS["quickstart"] / 20
    assert row["ping_ms_idle"]["median"] >= 4


def test_lines_add_up_to_the_round_trip_and_the_loss_of_two_hosts() -> None:
    line = bench.Setting(2, "100/10", 100, 1, "cubic").line(queue_ms=50)
    assert (line.down_mbit, line.up_mbit, line.queue_ms) == (100, 10, 50)
    assert 2 * (line.delay_ms + line.delay_ms) == 100
    assert 1 - (1 - line.loss) ** 2 == pytest.approx(0.01)


def test_bytes_by_backend_topology_and_ranks() -> None:
    def copies(backend: str, topology: str = "-") -> tuple[float, float]:
        made = bench.Contender(backend, topology)
        return made.copies_sent(8), made.copies_received(8)

    assert copies("gloo") == (1.75, 1.75)
    assert copies("distro", "mesh") == (7, 7)
    assert copies("distro", "hub") == (1, 7)


def test_what_is_not_measured_is_computed_from_bytes_of_fewer_ranks() -> None:
    args = argparse.Namespace(compute_seconds=0.3, measure_seconds=1)
    setting = bench.Setting(8, "100/10", 100, 0, "cubic")
    known = {("124m", "distro"): 1e6}
    rows = bench.Rows(args, setting, None, "124m", known)  # type: ignore[arg-type]
    mesh, hub = bench.Contender("distro", "mesh", 0), bench.Contender("distro", "hub", 1)
    assert rows.computed(mesh)["step_seconds_median"] == pytest.approx(0.3 + 5.6 + 0.05)
    assert rows.computed(hub)["step_seconds_median"] == pytest.approx(0.8 + 0.1)
    assert rows.computed(bench.Contender("powersgd"))["step_seconds_median"] is None


def test_the_models_have_the_weights_that_are_stated() -> None:
    for name, make in models.MODELS.items():
        model = make(0.0)
        assert sum(p.numel() for p in model.parameters()) == bench.WEIGHTS[name]
        model(model.inputs()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    "arguments", [["--links", "100"], ["--links", "0/1"], ["--loss", "100"], ["--model", "gpt9"]]
)
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _cli.main(["bench", "wan", *arguments])
    assert ended.value.code == 2


def test_where_nothing_can_be_emulated_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(internet, "EMULATOR", Path("/nonexistent"))
    assert _cli.main(["bench", "wan"]) == 1
    assert "DISTRO_BUILD_EMULATOR" in capsys.readouterr().err
