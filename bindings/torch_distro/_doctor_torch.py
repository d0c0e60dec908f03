"""Checks of torch, the adapter, the options, and an exchange between two processes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch_distro
from torch_distro._doctor_finding import Finding, failed, ok, warning
from torch_distro._extension import SUPPORTED, AdapterError, adapter_name, extension

_EXCHANGE_SECONDS = 90
_INSTALL_TORCH = "pip install 'torch>=2.11,<2.16', then reinstall torch-distro"


def versions() -> list[Finding]:
    """The package, Python, torch."""
    findings = []
    try:
        installed = importlib.metadata.version("torch-distro")
    except importlib.metadata.PackageNotFoundError:
        findings.append(
            failed(
                "package",
                f"torch_distro {torch_distro.__version__} is imported from "
                f"{Path(__file__).parent} but not installed: torch cannot find it by its name",
                "pip install . in its sources",
            )
        )
    else:
        findings.append(ok("package", f"torch-distro {installed} in {Path(__file__).parent}"))
    python = platform.python_version()
    findings.append(ok("python", f"{python}, {sys.executable}"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the autoload: the findings say it better
            import torch
    except ImportError as error:
        findings.append(failed("torch", f"cannot be imported: {error}", _INSTALL_TORCH))
        return findings
    version = str(torch.__version__)
    if not SUPPORTED[0] <= _minor(version) <= SUPPORTED[1]:
        findings.append(
            failed("torch", f"{version} is not supported (2.11 to 2.15 are)", _INSTALL_TORCH)
        )
    elif not torch.distributed.is_available():
        findings.append(
            failed("torch", f"{version}, built without distributed", "install another build")
        )
    else:
        findings.append(ok("torch", version))
    return findings


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def adapter() -> list[Finding]:
    """The extension module for this torch."""
    try:
        name = adapter_name()
        extension()
    except AdapterError as error:
        what, _, advice = str(error).rpartition(": ")
        return [failed("adapter", what, advice)]
    return [ok("adapter", f"{name} is there and loads")]


def entry_points() -> list[Finding]:
    """Whether torch finds the backend without an import."""
    groups = {
        group: [
            point.value
            for point in importlib.metadata.entry_points(group=group)
            if point.name == "distro"
        ]
        for group in ("torch.backends", "torch.distributed.backends")
    }
    missing = [group for group, values in groups.items() if not values]
    if missing:
        return [
            failed(
                "entry points",
                f"none named distro in {', '.join(missing)}",
                "reinstall torch-distro with pip; until then scripts need `import torch_distro` "
                "and torch_distro._autoload.register()",
            )
        ]
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        return [
            warning(
                "entry points",
                "TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns them off",
                "unset it; otherwise only torch 2.14 and later find distro, by its name",
            )
        ]
    return [ok("entry points", "torch finds distro by itself")]


def cpu() -> list[Finding]:
    """The instruction sets that the CPU has, and the one that is used."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags: set[str] = set()
    for line in lines:
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    found = [name for name in ("avx2", "fma", "f16c", "avx512f", "avx512bw") if name in flags]
    text = f"{os.cpu_count()} cores, {' '.join(found) or 'no vector instructions that are used'}"
    try:
        isa = extension().instruction_set()
    except AdapterError:
        return [ok("cpu", text)]
    if isa == "scalar" and os.environ.get("DISTRO_ISA", "auto") != "scalar":
        return [
            warning(
                "cpu", f"{text}; kernels: scalar", "expect a slow codec: it wants AVX2 at least"
            )
        ]
    return [ok("cpu", f"{text}; kernels: {os.environ.get('DISTRO_ISA') or isa}")]


# Of these each means something with the others only.
_TOGETHER = (
    frozenset({"DISTRO_CURVE_SECRET_FILE", "DISTRO_CURVE_PEERS_FILE"}),
    frozenset({"DISTRO_TOPOLOGY", "DISTRO_RELAY"}),
)


def variables() -> list[Finding]:
    """Each DISTRO_ variable, and what it comes to."""
    given = {name: text for name, text in os.environ.items() if name.startswith("DISTRO_")}
    if not given:
        return [ok("variables", "no DISTRO_ variable is set: the defaults")]
    try:
        core = extension()
    except AdapterError:
        return [
            warning(
                "variables",
                f"{', '.join(sorted(given))}: cannot be checked without the adapter",
                "see the adapter's finding",
            )
        ]
    findings = []
    for name, text in sorted(given.items()):
        names = next((some for some in _TOGETHER if name in some), frozenset({name}))
        try:
            agreed: dict[str, str] = core.check_options(
                {other: given[other] for other in names if other in given}, {}
            )
        except core.OptionError as error:
            what, _, advice = str(error).partition(". ")
            findings.append(failed("variables", what, advice or "correct or unset it"))
            continue
        value = agreed.get(name.removeprefix("DISTRO_").lower(), text)
        findings.append(ok("variables", f"{name}={text}" + (f": {value}" * (value != text))))
    return findings


def gpu() -> list[Finding]:
    """GPUs that torch sees."""
    try:
        import torch
    except ImportError:
        return []
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return [ok("gpu", ", ".join(names))]
    if any(Path("/dev").glob("nvidia[0-9]*")):
        why = "" if torch.version.cuda else f": torch {torch.__version__} is built without CUDA"
        return [
            warning(
                "gpu",
                f"this host has one, and torch does not see it{why}",
                "install a CUDA build of torch and a driver that it accepts; see "
                "CUDA_VISIBLE_DEVICES",
            )
        ]
    return [ok("gpu", "none: trains on the CPU")]


_OF_ONE_RANK = (
    "DISTRO_TOPOLOGY",
    "DISTRO_RELAY",
    "DISTRO_CURVE_SECRET_FILE",
    "DISTRO_CURVE_PEERS_FILE",
    "DISTRO_ADVERTISE",
)


def exchange() -> list[Finding]:
    """Two processes make a group, train a module for some steps, and compare what they hold."""
    try:
        extension()
    except AdapterError:
        return [warning("exchange", "not tried: there is no adapter", "see the adapter's finding")]
    environment = {**os.environ, "DISTRO_MODE": "weights"}
    environment.pop("DISTRO_STATS", None)
    if environment.get("DISTRO_TOPOLOGY") == "hub" or "DISTRO_CURVE_SECRET_FILE" in environment:
        # Both processes would be one rank, with its key and its place at the relay.
        for name in _OF_ONE_RANK:
            environment.pop(name, None)
        environment["DISTRO_BIND"] = "127.0.0.1"
    if environment.get("DISTRO_TRANSPORT") == "inproc":  # of threads, not of processes
        del environment["DISTRO_TRANSPORT"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch_distro._doctor_exchange", f"{folder}/store"]
        ranks = [
            subprocess.Popen(
                [*command, str(rank)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        results = []
        try:
            for rank, process in enumerate(ranks):
                out, errors = process.communicate(timeout=_EXCHANGE_SECONDS)
                if process.returncode != 0:
                    return [_exchange_failed(rank, errors)]
                results.append(json.loads(out.splitlines()[-1]))
        except subprocess.TimeoutExpired:
            return [
                failed(
                    "exchange",
                    f"two processes of this host did not finish within {_EXCHANGE_SECONDS} s",
                    "see whether the host is overloaded, or a firewall blocks loopback",
                )
            ]
        finally:
            for process in ranks:
                process.kill()
                process.communicate()
    if results[0]["checksum"] != results[1]["checksum"] or results[0]["exchanges"] == 0:
        return [
            failed(
                "exchange",
                f"the two ranks do not hold the same reference: {results}",
                "report this with the output of `torch-distro doctor --json`",
            )
        ]
    first = results[0]
    return [
        ok(
            "exchange",
            f"2 processes, {first['exchanges']} exchanges over {first['transport']} in "
            f"{first['seconds']:.2f} s, {first['payload_bytes']} bytes sent instead of "
            f"{first['gradient_bytes']}, the same weights on both",
        )
    ]


def _exchange_failed(rank: int, errors: str) -> Finding:
    lines = [line for line in errors.strip().splitlines() if line.strip()]
    return failed(
        "exchange",
        f"rank {rank} failed: {lines[-1] if lines else 'without a word'}",
        "the message says what to do; DISTRO_LOG=debug tells more",
    )
