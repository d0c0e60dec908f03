"""docs/internet.md does what it says: its commands, in order, on the machines that it names."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch_distro
from torch_distro._wan.internet import Internet, Line, unavailable

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(torch_distro.__file__).parent / "bin"
REASON = unavailable() or ("" if shutil.which("ssh") else "the command ssh is not installed")
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

PEOPLE = ("anna", "bob", "cara")
SERVER = "server"
BLOCK = re.compile(r"^```sh (?P<where>[^\n]*)\n(?P<commands>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    machines: list[str]
    own_terminal: bool
    commands: str


def blocks() -> list[Block]:
    """Those of the document that are for a machine."""
    text = (ROOT / "docs" / "internet.md").read_text(encoding="utf-8")
    found = []
    for block in BLOCK.finditer(text):
        words = block["where"].split()
        machines = [word for word in words if word != "terminal"]
        assert set(machines) <= {*PEOPLE, SERVER}, f"a block for {machines}"
        found.append(Block(machines, "terminal" in words, block["commands"]))
    return found


class Machines:
    """Three homes behind NAT and a server, each with a folder that its commands run in."""

    def __init__(self, internet: Internet, folder: Path) -> None:
        self.internet = internet
        self.hosts = {name: number for number, name in enumerate((*PEOPLE, SERVER))}
        self.folders = {name: folder / name for name in self.hosts}
        self.background: list[tuple[str, str, subprocess.Popen[str], Path]] = []
        server = internet.addresses[self.hosts[SERVER]]
        for name, home in self.folders.items():
            home.mkdir()
            # `ip netns exec` lays these files over those of /etc.
            etc = Path("/etc/netns") / internet.names[self.hosts[name]]
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{server} server.example\n")
            shutil.copy(ROOT / "integration" / "train_gpt.py", home)
            (home / "data").symlink_to(ROOT / "integration" / "data")
            commands = home / "commands"
            commands.mkdir()
            if name == SERVER:
                for program in ("torch-distro-relay", "torch-distro-keygen"):
                    (commands / program).symlink_to(PROGRAMS / program)
                continue
            for program, module in (
                ("torchrun", "torch.distributed.run"),
                ("torch-distro", "torch_distro"),
            ):
                script = commands / program
                script.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
                script.chmod(0o755)
        self._ssh()

    def close(self) -> None:
        for name in self.hosts:
            shutil.rmtree(Path("/etc/netns") / self.internet.names[self.hosts[name]])

    def _ssh(self) -> None:
        """People have a login on the server."""
        server = self.folders[SERVER]
        for name in self.hosts:
            key = self.folders[name] / "ssh_key"
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        users = server / "authorized_keys"
        users.write_text(
            "".join((self.folders[name] / "ssh_key.pub").read_text() for name in PEOPLE)
        )
        for name in PEOPLE:
            ssh = self.folders[name] / "commands" / "ssh"
            options = f"-F none -i {self.folders[name] / 'ssh_key'} -o StrictHostKeyChecking=no"
            ssh.write_text(
                f"#!/bin/sh\nexec {shutil.which('ssh')} {options} -o UserKnownHostsFile=/dev/null "
                '"$@"\n'
            )
            ssh.chmod(0o755)
        command = f"exec {sys.executable} {Path(__file__).parent / 'ssh_server.py'} "
        self.start(SERVER, command + f"{server / 'ssh_key'} {users}")
        self.wait_for(SERVER, "listening")

    def _process(self, name: str, commands: str, output: Path) -> subprocess.Popen[str]:
        home = self.folders[name]
        path = f"{home / 'commands'}:{os.environ['PATH']}"
        script = f"set -e; cd {shlex.quote(str(home))}; {commands}"
        env = {"PATH": path, "OMP_NUM_THREADS": "1"}
        if name in PEOPLE:
            env["ME"] = str(PEOPLE.index(name))
        with output.open("w") as out:
            return self.internet.popen(
                self.hosts[name], ["bash", "-c", script], env, stdout=out, stderr=subprocess.STDOUT
            )

    def start(self, name: str, commands: str) -> None:
        """In a terminal of its own."""
        output = self.folders[name] / f"terminal{len(self.background)}.txt"
        process = self._process(name, commands, output)
        self.background.append((name, commands, process, output))

    def wait_for(self, name: str, text: str, seconds: float = 30.0) -> None:
        """Until the machine's last terminal shows the text."""
        output = [path for machine, _, _, path in self.background if machine == name][-1]
        end = time.monotonic() + seconds
        while text not in output.read_text():
            assert time.monotonic() < end, output.read_text()
            time.sleep(0.05)

    def run(self, names: list[str], commands: str, seconds: float) -> dict[str, str]:
        """On all of them at once; what each prints."""
        outputs = {name: self.folders[name] / "output.txt" for name in names}
        processes = {name: self._process(name, commands, outputs[name]) for name in names}
        end = time.monotonic() + seconds
        for name, process in processes.items():
            try:
                code: int | str = process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = f"none after {seconds} s"
            assert code == 0, f"{name}: exit code {code}:\n{commands}\n{outputs[name].read_text()}"
        return {name: output.read_text() for name, output in outputs.items()}


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    home = Line(up_mbit=10, down_mbit=100, delay_ms=10, nat=True)
    with Internet([home] * len(PEOPLE), server=Line(delay_ms=1)) as internet:
        made = Machines(internet, tmp_path)
        try:
            yield made
        finally:
            made.close()


def test_three_people_at_home_train_by_the_document_alone(machines: Machines) -> None:
    lines: list[str] = []
    outputs: dict[str, str] = {}
    for block in blocks():
        if not block.own_terminal:
            outputs = machines.run(block.machines, block.commands, seconds=240)
        for name in block.machines if block.own_terminal else ():
            machines.start(name, block.commands)
            if "relay" in block.commands:
                machines.wait_for(name, "listening at")
        if "keygen" in block.commands:
            lines += [
                line
                for name in block.machines
                for line in outputs[name].splitlines()
                if re.match(r"(\d+|relay) \S{40}$", line)
            ]
            # "Put the four lines into a file and give it to all four."
            for home in machines.folders.values():
                (home / "peers.txt").write_text("\n".join(lines) + "\n")
    assert len(lines) == 4
    # The last block was the training.
    for name in PEOPLE:
        assert "joined the relay tcp://server.example:29600" in outputs[name], outputs[name]
    assert "30/30" in outputs["anna"], outputs["anna"]
    for name, commands, process, output in machines.background:
        assert process.poll() is None, f"{name}: {commands} has ended: {output.read_text()}"
