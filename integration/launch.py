"""Runs a training script on several ranks, as torchrun does or by torchrun itself."""

from __future__ import annotations

import atexit
import importlib.util
import os
import re
import runpy
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

# Imported once, in the process that forks the ranks; those that are not installed are left out.
PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch.distributed.optim",
    "torch.distributed.pipelining",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.tensor.parallel",
    "lightning.pytorch",
    "accelerate",
    "transformers.trainer",
    "transformers.models.gpt2.modeling_gpt2",
)
# What a rank's environment must not take over from the shell.
OURS = ("DISTRO_", "TORCHELASTIC_", "ACCELERATE_")
_RAISED = re.compile(r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception)\b")


@dataclass(frozen=True)
class Ended:
    """What is left of a run: exit code (None: killed after the deadline) and output, by rank."""

    codes: list[int | None]
    outputs: list[str]

    @property
    def succeeded(self) -> bool:
        return all(code == 0 for code in self.codes)

    def why_not(self) -> str:
        """Last words of the rank that failed, for people."""
        for rank, (code, output) in enumerate(zip(self.codes, self.outputs, strict=True)):
            if code != 0:
                lines = [line for line in output.splitlines() if line.strip()]
                # What was raised comes before what torchrun says about it.
                raised = [
                    line for line in lines if _RAISED.match(line) and "ChildFailed" not in line
                ]
                last = (raised or lines or ["nothing printed"])[-1].strip()
                how = "hangs" if code is None else f"exit code {code}"
                return f"rank {rank}: {how}: {last}"
        return ""


def _site(number: int, sites: int) -> dict[str, str]:
    return {"DISTRO_SITE": f"house{number}"} if sites > 1 else {}


def _environment(
    rank: int, ranks: int, port: int, env: dict[str, str], sites: int
) -> dict[str, str]:
    """What torchrun tells a rank."""
    return {
        **_site(rank * sites // ranks, sites),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "matrix",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
        **env,
    }


def _rank(script: Path, arguments: list[str], env: dict[str, str], output: Path) -> None:
    with output.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    for name in [name for name in os.environ if name.startswith(OURS)]:
        del os.environ[name]
    os.environ.update(env)
    import torch

    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    code = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # A process of multiprocessing ends without these.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fork(
    script: Path,
    arguments: list[str],
    ranks: int,
    env: dict[str, str],
    folder: Path,
    deadline: float = 120.0,
    sites: int = 1,
) -> Ended:
    """Run a script in ranks that are forked from a process that has imported torch already.

    What torchrun does in ten seconds takes one or two.

    Args:
        script: a file; it runs as ``__main__``.
        arguments: its command line.
        ranks: number of processes.
        env: further variables of the ranks.
        folder: where their output goes.
        deadline: seconds after which they are killed.
        sites: into how many sites (DISTRO_SITE) they are parted.
    """
    import torch.distributed as dist
    import torch.multiprocessing as mp

    context = mp.get_context("forkserver")
    context.set_forkserver_preload([m for m in PRELOADED if _importable(m)])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    outputs = [folder / f"rank{rank}.txt" for rank in range(ranks)]
    processes = [
        context.Process(
            target=_rank,
            args=(
                script,
                arguments,
                _environment(rank, ranks, store.port, env, sites),
                outputs[rank],
            ),
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + deadline
    codes: list[int | None] = []
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        codes.append(process.exitcode)
        process.kill()
        process.join()
    return Ended(codes, [path.read_text() if path.exists() else "" for path in outputs])


def torchrun(
    script: Path,
    arguments: list[str],
    ranks: int,
    env: dict[str, str],
    folder: Path,
    deadline: float = 300.0,
    sites: int = 1,
) -> Ended:
    """The same by the command that a user would type, one for each site; an output for each."""
    meeting = ["--standalone"]
    if sites > 1:
        meeting = [f"--nnodes={sites}", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    commands = []
    for site in range(sites):
        command = [sys.executable, "-m", "torch.distributed.run", *meeting]
        command += [f"--node-rank={site}"] if sites > 1 else []
        commands.append([*command, f"--nproc-per-node={ranks // sites}", str(script), *arguments])
    return agents(commands, [env | _site(site, sites) for site in range(sites)], folder, deadline)


def agents(
    commands: list[list[str]], envs: list[dict[str, str]], folder: Path, deadline: float
) -> Ended:
    """Run commands side by side, each with further variables; an output for each."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    outputs = [folder / f"agent{number}.txt" for number in range(len(commands))]
    processes = []
    for command, env, output in zip(commands, envs, outputs, strict=True):
        with output.open("w") as out:
            processes.append(
                subprocess.Popen(
                    command,
                    env={**clean, "OMP_NUM_THREADS": "1", **env},
                    cwd=folder,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
    end = time.monotonic() + deadline
    codes: list[int | None] = []
    for process in processes:
        try:
            codes.append(process.wait(max(0.0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
            process.terminate()  # torchrun ends its ranks
            process.wait()
    return Ended(codes, [path.read_text() for path in outputs])


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is not None
