"""DISTRO_DEFAULT: what a script gets that names no backend, or nccl.

Each in a process of its own, since the variable acts when torch is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

NAMES = """
import json, torch, torch.distributed as dist
found = {}
def backend(of, *names, **options):
    dist.init_process_group(*names, store=dist.HashStore(), rank=0, world_size=1, **options)
    try:
        found[of] = dist.get_backend()
        if of == "none":
            found["a group more"] = dist.get_backend(dist.new_group())
            found["a group of nccl"] = dist.get_backend(dist.new_group(backend="nccl"))
            found["a group of gloo"] = dist.get_backend(dist.new_group(backend="gloo"))
        tensor = torch.ones(3)
        dist.all_reduce(tensor)
        assert tensor.tolist() == [1, 1, 1]
    finally:
        dist.destroy_process_group()
backend("none")
backend("nccl", "nccl")
backend("NCCL", "NCCL")
backend("constant", dist.Backend.NCCL)
backend("both", "cpu:gloo,cuda:nccl")
backend("of the device", dist.get_default_backend_for_device("cpu"))
backend("gloo", "gloo")
backend("gloo for cpu", "cpu:gloo")
if hasattr(dist, "ProcessGroupNCCL"):
    backend("options of nccl", "nccl", pg_options=dist.ProcessGroupNCCL.Options())
print(json.dumps(found))
"""

UNUSED = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
print([str(warning.message) for warning in caught if "distro" in str(warning.message)])
import torch.distributed as dist
def init(*names):
    dist.init_process_group(*names, store=dist.HashStore(), rank=0, world_size=1)
    print(dist.get_backend())
    dist.destroy_process_group()
init("gloo")
try:
    init(*NAMES)
except Exception as error:
    print(type(error).__name__, error)
"""


def run(code: str, **env: str) -> list[str]:
    """Lines that a process with these variables prints."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DISTRO_")}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout.splitlines()


def test_names_of_torchs_default_become_distro_and_gloo_stays() -> None:
    found = json.loads(run(NAMES, DISTRO_DEFAULT="1")[-1])
    gloo = {name: found.pop(name) for name in ("gloo", "a group of gloo", "gloo for cpu")}
    assert set(gloo.values()) <= {"gloo", "cpu:gloo"}
    assert set(found.values()) == {"distro"}
    assert len(found) >= 8


def test_a_bad_value_is_an_error_where_a_group_is_made() -> None:
    said = run(UNUSED.replace("NAMES", "['nccl']"), DISTRO_DEFAULT="yes")
    assert said[:2] == ["[]", "gloo"]
    assert said[2].startswith("ValueError DISTRO_DEFAULT=yes is not allowed. Allowed: 0, 1.")


def test_without_an_adapter_torchs_defaults_stay_with_a_warning(tmp_path: Path) -> None:
    # The package without its compiled part, in front of the installed one.
    import torch_distro

    package = tmp_path / "torch_distro"
    package.mkdir()
    for source in Path(torch_distro.__file__).parent.glob("*.py"):
        (package / source.name).symlink_to(source)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    said = run(UNUSED.replace("NAMES", "[]"), DISTRO_DEFAULT="1", PYTHONPATH=path)
    assert "DISTRO_DEFAULT=1 has no effect" in said[0]
    assert said[1] == "gloo"
    assert "distro" not in said[2].lower().split()


def test_unset_nothing_is_replaced() -> None:
    code = "import torch.distributed as d; print(d.Backend('nccl'), d.Backend('undefined'))"
    assert run(code) == ["nccl undefined"]
