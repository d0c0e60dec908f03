"""A training of the study by real ranks: the quick start's script under torchrun."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import train_gpt
from launch import torchrun
from participants import Run, result_of

BACKENDS = {"dense": "gloo", "alone": "none", "weights": "distro"}
VARIABLES = {
    "k": "DISTRO_K",
    "delay": "DISTRO_DELAY",
    "gain": "DISTRO_GAIN",
}
"""Setting of the method -> variable of the backend."""
# A training on a busy machine; one that hangs is found by the group's own timeout.
DEADLINE_SECONDS = 6 * 3600.0


def train(run: Run) -> dict[str, Any]:
    """As participants.train; the curve is of x only, `mean` at the end is after average().

    Raises:
        ValueError: the script does not train this, or no variable sets this.
        RuntimeError: a rank failed.
    """
    if run.task != "chargpt" or run.optimizer != "adamw" or run.method not in BACKENDS:
        raise ValueError(f"real ranks train chargpt by adamw with {', '.join(BACKENDS)} only")
    if unknown := run.method_settings.keys() - VARIABLES.keys():
        raise ValueError(f"the quick start's script cannot set {', '.join(sorted(unknown))}")
    every = max(1, run.steps // run.evaluations)
    arguments = {
        "steps": run.steps, "batch": run.batch, "lr": run.lr, "warmup": run.warmup,
        "weight-decay": run.weight_decay, "clip": run.clip, "seed": run.seed, "eval-every": every,
        "width": 64, "layers": 2, "heads": 4, "block": 64, **run.task_settings,
    }  # fmt: skip
    env = {VARIABLES[name]: str(value) for name, value in run.method_settings.items()}
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [f"--backend={BACKENDS[run.method]}", f"--out={folder / 'out.json'}"]
        command += [f"--{name}={value}" for name, value in arguments.items()]
        script = Path(train_gpt.__file__)
        ended = torchrun(script, command, run.participants, env, folder, DEADLINE_SECONDS)
        if not ended.succeeded:
            raise RuntimeError(ended.why_not())
        result = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    curve = [{"step": step, "x": loss} for step, loss in result["history"]["validation"]]
    if run.method == "weights":
        curve[-1]["mean"] = result["val_loss_average"]
    parameters = result["parameters"]
    own = result["per_rank"][0]
    bits = 8.0 * (own["gradient_bytes"] if run.method == "dense" else own["payload_bytes_sent"])
    if run.method == "weights":
        bits /= run.participants - 1  # it counts what it sent to each
    return result_of(run, parameters, bits, curve, time.perf_counter() - begin)
