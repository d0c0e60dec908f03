"""A torch that the package was not built for: a clear error, and `import torch` works on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_distro._extension as extension


def _run(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0", "3.0.0+cu130"])
def test_an_unsupported_torch_is_named_with_the_fix(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(extension.AdapterError, match=r"supports torch 2\.11 to 2\.15") as caught:
        extension.adapter_name()
    assert version in str(caught.value)
    assert "pip install" in str(caught.value)


def test_another_minor_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    built = extension.adapter_name().removeprefix("_c10d_").replace("_", ".")
    other = "2.12.0" if built != "2.12" else "2.13.0"
    monkeypatch.setattr(torch, "__version__", other)
    with pytest.raises(
        extension.AdapterError, match=f"built for torch .*{built}.*this is torch {other}"
    ):
        extension.adapter_name()


def test_a_missing_torch_is_named_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    done = _run(
        "import torch_distro; print(torch_distro.__version__); torch_distro.stats", tmp_path
    )
    assert done.stdout.strip() == "0.1.0"
    assert done.returncode != 0
    assert "torch" in done.stderr


BROKEN = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
ours = [str(w.message) for w in caught if "torch-distro" in str(w.message)]
print(len(ours), ours)
torch.zeros(2)
import torch.distributed as dist
try:
    dist.init_process_group("distro", store=dist.HashStore(), rank=0, world_size=1)
except ImportError as error:
    print("refused:", error)
"""


def test_an_adapter_for_another_torch_never_breaks_import_torch(tmp_path: Path) -> None:
    package = tmp_path / "torch_distro"
    package.mkdir()
    for source in Path(extension.__file__).parent.glob("*.py"):
        (package / source.name).write_text(source.read_text())
    (package / "_c10d_2_14.so").write_bytes(b"not this one")
    done = _run(BROKEN, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 ")
    assert "reinstall torch-distro" in done.stdout
    assert "refused: torch-distro was built for torch 2.14" in done.stdout
