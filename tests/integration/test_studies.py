"""The studies' harness on trainings that take seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

STUDIES = Path(__file__).resolve().parents[2] / "integration" / "studies"
sys.path[:0] = [str(STUDIES), str(STUDIES.parent)]

import methods  # noqa: E402
import participants  # noqa: E402
import processes  # noqa: E402

SMALL = {
    "task_settings.width": 32,
    "task_settings.layers": 1,
    "task_settings.heads": 2,
    "task_settings.block": 16,
    "participants": 2,
    "batch": 2,
    "steps": 12,
    "warmup": 2,
    "evaluations": 2,
}


def study(*arguments: str | Path) -> str:
    command = [sys.executable, str(STUDIES / "study.py"), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def results_of(grid: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    path = folder / "grid.json"
    path.write_text(json.dumps(grid))
    study("run", path, "--results", folder)
    return [json.loads(line) for line in (folder / "grid.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    names = ["dense", "alone", "weights", "sparta", "diloco", "sparseloco", "powersgd", "demo"]
    without_turns = {**SMALL, "method": "weights", "method_settings.turns": 1}
    results_of([{**SMALL, "method": names}, without_turns], folder)
    return folder


def test_a_grid_is_made_once(folder: Path) -> None:
    before = (folder / "grid.jsonl").read_text()
    assert len(before.splitlines()) == 9
    study("run", folder / "grid.json", "--results", folder)
    assert (folder / "grid.jsonl").read_text() == before


def test_the_table_sets_each_method_beside_dense(folder: Path) -> None:
    table = study("table", folder / "grid.jsonl")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:3]] == ["| dense", "| alone"]
    assert len(rows) == 10
    assert all("%" in row for row in rows[1:])


def test_curves_are_drawn(folder: Path) -> None:
    for command in ("plot", "gaps"):
        picture = folder / f"{command}.png"
        study(command, folder / "grid.jsonl", "--out", picture)
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_participants_in_one_process_train_as_ranks_do(tmp_path: Path) -> None:
    results = results_of(
        [
            {**SMALL, "method": ["dense", "weights"], "engine": ["participants", "processes"]},
            {**SMALL, "method": "weights", "engine": ["participants", "processes"],
             "method_settings.delay": 0, "method_settings.k": 512},
        ],
        tmp_path,
    )  # fmt: skip
    by: dict[str, dict[str, Any]] = defaultdict(dict)
    for r in results:
        name = json.dumps([r["run"]["method"], r["run"]["method_settings"]])
        by[name][r["run"]["engine"]] = r
    assert len(by) == 3
    for pair in by.values():
        own, real = pair["participants"], pair["processes"]
        assert own["parameters"] == real["parameters"]
        assert own["final"]["x"] == pytest.approx(real["final"]["x"], abs=1e-4)
        assert own["final"].get("mean") == pytest.approx(real["final"].get("mean"), abs=1e-4)
        # Real records have an envelope.
        assert own["bits_a_parameter_and_step"] <= real["bits_a_parameter_and_step"]


def test_demo_with_all_coefficients_steps_by_the_sign_of_the_mean() -> None:
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(3, *shape, generator=generator) for shape in ((128, 192), (70,))]
    expected = [gradient.mean(0).sign() for gradient in gradients]
    demo = methods.Demo(gradients, k=4096, value_bits=32)
    assert demo.reduce(gradients)
    for gradient, signs in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, signs.expand_as(gradient))
    assert all(momentum.abs().max() < 1e-4 for momentum in demo.momenta)


def test_powersgd_passes_gradients_of_rank_one_once_all_are_added_up() -> None:
    generator = torch.Generator().manual_seed(4)
    columns = torch.randn(3, 40, 1, generator=generator)
    gradient = columns * torch.randn(1, 1, 30, generator=generator)
    powersgd = methods.PowerSgd([gradient], every=2)
    assert not powersgd.reduce([gradient.clone()])
    last = 3 * gradient
    assert powersgd.reduce([last])
    assert torch.allclose(last, (2 * gradient).mean(0).expand_as(last), atol=1e-5)
    assert powersgd.bits == 32 * (40 + 30)


def test_tasks_that_classify_tell_how_many_are_right(tmp_path: Path) -> None:
    small = {"participants": 2, "batch": 4, "steps": 6, "warmup": 2, "evaluations": 1}
    tasks = {
        "charmlp": {"task_settings.width": 16},
        "bytecnn": {"task_settings.width": 8, "task_settings.block": 64},
    }
    grid = [
        {**small, **settings, "task": task, "optimizer": optimizer, "method": ["dense", "weights"]}
        for task, settings in tasks.items()
        for optimizer in ("adamw", "sgd")
    ]
    results = results_of(grid, tmp_path)
    assert len(results) == 8
    for result in results:
        final = result["final"]
        names = ["x"] if result["run"]["method"] == "dense" else ["x", "mean", "W"]
        assert final.keys() == {"step", *names, *(f"{name} accuracy" for name in names)}
        assert all(0 <= final[f"{name} accuracy"] <= 1 for name in names)
    assert "% right" in study("table", tmp_path / "grid.jsonl")


def test_a_setting_that_real_ranks_cannot_take_is_named() -> None:
    run = participants.Run("weights", engine="processes", method_settings={"turns": 2})
    with pytest.raises(ValueError, match="turns"):
        processes.train(run)
