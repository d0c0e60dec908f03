"""Two houses, each a network namespace with two ranks, and what goes over the line between them.

    python integration/houses.py      # as root

Runs scripts of integration/frameworks, unchanged, with gloo and with distro (DISTRO_SITE set in
each house), by a torchrun in each house, twice: for some steps and for more. The line is a pair of
virtual interfaces whose bytes the kernel counts; the difference of the two runs is what a step
costs, without the beginning and the end. Prints JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch import Ended, agents
from matrix import losses_of
from rows import FOLDER
from torch_distro._wan.namespaces import Namespaces, ip

# And what tells them how many steps to make.
SCRIPTS = {"nanogpt.py": "--max-iters", "fsdp1.py": "--steps", "fsdp2_example.py": "--steps"}
LINE = "line"  # the interface's name in each house


class Houses:
    """Network namespaces that are joined by one line, until close().

    Raises:
        OSError: they cannot be made; root and the command `ip` are needed.
    """

    def __init__(self) -> None:
        self._namespaces = Namespaces(["berlin", "lyon"])
        self.names = self._namespaces.names
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        first, second = self.names
        try:
            peer = ("peer", "name", LINE, "netns", second)
            ip("link", "add", LINE, "netns", first, "type", "veth", *peer)
            for name, address in zip(self.names, self.addresses, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", LINE)
                ip("-n", name, "link", "set", LINE, "up")
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Remove them. Idempotent."""
        self._namespaces.close()

    def bytes_on_the_line(self) -> int:
        """Sent by both houses so far, as the kernel counts them."""
        links = [
            json.loads(ip("-n", name, "-s", "-j", "link", "show", LINE)) for name in self.names
        ]
        return sum(link["stats64"]["tx"]["bytes"] for (link,) in links)

    def run(
        self, script: Path, arguments: list[str], backend: str, folder: Path, deadline: float
    ) -> Ended:
        """A torchrun of two ranks in each house."""
        commands, envs = [], []
        for number, name in enumerate(self.names):
            commands.append(
                [
                    *("ip", "netns", "exec", name),
                    *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2"),
                    *(f"--node-rank={number}", "--nproc-per-node=2"),
                    *(f"--master-addr={self.addresses[0]}", "--master-port=29500"),
                    *(str(script), "--backend", backend, *arguments),
                ]
            )
            envs.append({"GLOO_SOCKET_IFNAME": LINE})
            if backend == "distro":
                envs[-1] |= {
                    "DISTRO_SITE": name,
                    "DISTRO_INSECURE": "1",
                    "DISTRO_STATS": f"{folder}/stats.json",
                }
        return agents(commands, envs, folder, deadline)


def measure(
    houses: Houses, script: str, backend: str, steps: tuple[int, int], deadline: float = 120.0
) -> dict[str, Any]:
    """One row: bytes between the houses, for a step and for the rest.

    Raises:
        RuntimeError: a run fails.
    """
    sent, losses = [], []
    for number in steps:
        with tempfile.TemporaryDirectory() as temporary:
            before = houses.bytes_on_the_line()
            arguments = [SCRIPTS[script], str(number)]
            ended = houses.run(FOLDER / script, arguments, backend, Path(temporary), deadline)
            if not ended.succeeded:
                raise RuntimeError(f"{script} with {backend}: {ended.why_not()}")
            sent.append(houses.bytes_on_the_line() - before)
            losses = losses_of("\n".join(ended.outputs))
            paths = sorted(Path(temporary).glob("stats.rank*.json"))
            stats = [json.loads(path.read_text()) for path in paths]
    groups = [[own, *own["groups"]] for own in stats]
    a_step = (sent[1] - sent[0]) / (steps[1] - steps[0])
    return {
        "script": script,
        "backend": backend,
        "loss_first_and_last": [losses[0], losses[-1]],
        "bytes_between_houses_a_step": a_step,
        "bytes_between_houses_beside": sent[0] - steps[0] * a_step,
        "gradient_bytes_a_step": sum(g["gradient_bytes"] for own in groups for g in own)
        // max(1, steps[1] - 1),
        "payload_bytes_sent": [sum(g["payload_bytes_sent"] for g in own) for own in groups],
        "modes": sorted({m["mode"] for own in groups for g in own for m in g["modules"]}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS)
    parser.add_argument("--steps", nargs=2, type=int, default=(8, 32), metavar=("FEW", "MORE"))
    args = parser.parse_args()
    rows = []
    with contextlib.closing(Houses()) as houses:
        for script in args.scripts:
            for backend in ("gloo", "distro"):
                rows.append(measure(houses, script, backend, tuple(args.steps)))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
