"""Hosts with home lines: network namespaces, and the emulator that forwards packets between them.

The kernel's netem is not everywhere; `torch-distro-emulator` does what it does. Needs root,
/dev/net/tun and the command `ip`. No packet leaves the namespaces.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from torch_distro._wan.namespaces import Namespaces, ended_by_sigterm, ip

EMULATOR = Path(__file__).resolve().parents[1] / "bin" / "torch-distro-emulator"
INTERFACE = "line"  # each host's interface to the internet
NETWORK = "10.78.0"
SERVER_NUMBER = 254  # last byte of the server's address; rank r has r + 1
# What a program's environment must not take over from the shell.
_NOT_PASSED_ON = ("DISTRO_", "TORCHELASTIC_")
_ICMP_ECHO = 8
# Seconds until the emulator has made all interfaces, or answered a command. Longer: one that hangs
# is noticed late; shorter: a busy machine looks like one.
_PATIENCE = 30.0


class InternetError(OSError):
    """The internet cannot be emulated here: what is missing, and what to do."""


@dataclasses.dataclass(frozen=True)
class Line:
    """The line between a host and the middle of the internet; as `Line` of the emulator.

    Args:
        up_mbit: Mbit/s from the host; 0: no limit.
        down_mbit: Mbit/s to the host; 0: no limit.
        delay_ms: one way, to the middle: the round trip of two hosts takes twice the sum of theirs.
        jitter_ms: each packet takes up to so much longer; their order stays.
        loss: probability, of each packet in either direction.
        reorder: probability that a packet which is sent is overtaken by later ones.
        duplicate: probability that a packet which is sent arrives twice.
        queue_ms: what may wait before the line, in either direction, as time.
        queue_bytes: the same as bytes, which wins; 0: by queue_ms.
        nat: only answers to what the host began reach it, as behind a home router.
    """

    up_mbit: float = 100
    down_mbit: float = 100
    delay_ms: float = 25
    jitter_ms: float = 0
    loss: float = 0
    reorder: float = 0
    duplicate: float = 0
    queue_ms: float = 100
    queue_bytes: float = 0
    nat: bool = False


class Internet:
    """Hosts 0, 1, ... (the ranks) and, after them, a server; a context manager.

    Args:
        lines: of the ranks.
        server: of a host for rendezvous and relay, if there is to be one.
        seed: of loss, jitter, reordering and duplication.
        congestion: of TCP on all hosts (``cubic``, ``bbr``, ``reno``); the kernel's default if not
            given.

    Raises:
        InternetError: without root, /dev/net/tun, the command `ip` or the emulator.
    """

    def __init__(
        self,
        lines: Sequence[Line],
        server: Line | None = None,
        seed: int = 1,
        congestion: Literal["cubic", "bbr", "reno"] | None = None,
    ) -> None:
        every = [*lines, *([server] if server else [])]
        if not 0 < len(lines) < SERVER_NUMBER:
            raise ValueError(f"an internet has 1 to {SERVER_NUMBER - 1} ranks, not {len(lines)}")
        self.ranks = len(lines)
        self.server = self.ranks if server else None
        self.addresses = [f"{NETWORK}.{rank + 1}" for rank in range(self.ranks)]
        self.addresses += [f"{NETWORK}.{SERVER_NUMBER}"] if server else []
        self._congestion = congestion
        self._lock = threading.Lock()  # a command and its answer
        self._emulator: subprocess.Popen[str] | None = None
        self._started: list[subprocess.Popen[str]] = []
        self._exits = contextlib.ExitStack()
        if not EMULATOR.exists():
            raise InternetError(
                f"{EMULATOR} is missing: the package was built with DISTRO_BUILD_EMULATOR=OFF"
            )
        labels = [f"rank{rank}" for rank in range(self.ranks)] + ["server"] * (server is not None)
        try:
            self._namespaces = Namespaces(labels)
        except OSError as error:
            raise InternetError(f"network namespaces cannot be made here: {error}") from None
        self.names = self._namespaces.names
        try:
            self._start(seed)
            for host, line in enumerate(every):
                self._plug(host)
                self.set_line(host, **dataclasses.asdict(line))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Internet:
        self._exits.enter_context(ended_by_sigterm())
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill what runs on the hosts, and remove them. Idempotent."""
        for process in self._started:
            # It may not be in its namespace yet, where the next line finds what it started.
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        self._namespaces.close()
        for process in self._started:
            process.wait()
        if self._emulator is not None:
            assert self._emulator.stdin is not None
            with contextlib.suppress(OSError):
                self._emulator.stdin.close()
            self._emulator.kill()
            self._emulator.wait()
        self._exits.close()

    # Programs on the hosts

    def popen(
        self,
        host: int,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        stdin: int | IO[Any] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a program on a host.

        Its environment is this process's, without DISTRO_ and torchrun's variables, and `env`. It
        leads a session, and is killed by close() at the latest.
        """
        clean = {n: value for n, value in os.environ.items() if not n.startswith(_NOT_PASSED_ON)}
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *command],
            env={**clean, "GLOO_SOCKET_IFNAME": INTERFACE, **(env or {})},
            stdin=stdin if stdin is not None else subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        self._started = [other for other in self._started if other.poll() is None]
        self._started.append(process)
        return process

    def run(
        self,
        host: int,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a host to its end.

        Raises:
            subprocess.TimeoutExpired: it has been killed after `timeout` seconds.
        """
        process = self.popen(host, command, env, subprocess.PIPE, subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def socket(self, host: int, kind: socket.SocketKind, protocol: int = 0) -> socket.socket:
        """An IPv4 socket of this process that lives on a host.

        Raises:
            OSError: it cannot be made.
        """
        return self._namespaces.socket(self.names[host], kind, protocol)

    def ping(self, host: int, peer: int, timeout: float = 5.0) -> float | None:
        """Seconds of one ICMP echo there and back; None: no answer within `timeout` seconds."""
        with self.socket(host, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
            number = os.urandom(4)
            request = struct.pack("!BBH4s", _ICMP_ECHO, 0, 0, number)
            request = struct.pack("!BBH4s", _ICMP_ECHO, 0, _checksum(request), number)
            begin = time.monotonic()
            raw.sendto(request, (self.addresses[peer], 0))
            while (left := begin + timeout - time.monotonic()) > 0:
                raw.settimeout(left)
                try:
                    packet = raw.recv(2048)
                except TimeoutError:
                    break
                answer = packet[(packet[0] & 15) * 4 :]
                if answer[0] == 0 and answer[4:8] == number:
                    return time.monotonic() - begin
        return None

    # Their lines

    def set_line(self, host: int, **changes: float | bool) -> None:
        """Change what is named, as :class:`Line` has it; the rest stays.

        What waits in the queue still goes at the old rate.

        Raises:
            ValueError: the emulator does not take it, and has changed nothing.
        """
        self._tell({"do": "set", "host": host, **changes})

    def cut(self, host: int, seconds: float, peer: int | None = None) -> None:
        """Nothing passes a host's line, or between it and `peer`, for so long; 0: it is whole."""
        way = {} if peer is None else {"peer": peer}
        self._tell({"do": "cut", "host": host, "seconds": seconds, **way})

    def move(self, host: int, address: str) -> None:
        """Give a host another address of the network, as a provider does at night.

        Raises:
            ValueError: another host has it.
        """
        self._tell({"do": "set", "host": host, "address": address})
        ip("-n", self.names[host], "address", "flush", "dev", INTERFACE)
        self.addresses[host] = address
        self._give_address(host)

    def counters(self) -> list[dict[str, int]]:
        """Of each host, since the start; as `Counters` of the emulator."""
        hosts: list[dict[str, int]] = self._tell({"do": "counters"})["hosts"]
        return hosts

    def _start(self, seed: int) -> None:
        self._emulator = subprocess.Popen(
            [
                str(EMULATOR),
                f"--namespaces={','.join(self.names)}",
                f"--addresses={','.join(self.addresses)}",
                f"--interface={INTERFACE}",
                f"--seed={seed}",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C is for us: it has to live until the hosts are closed.
            start_new_session=True,
        )
        first = self._answer()
        if "error" in first:
            raise InternetError(first["error"])

    def _plug(self, host: int) -> None:
        self._give_address(host)
        ip("-n", self.names[host], "link", "set", INTERFACE, "up")
        if self._congestion:
            route = (f"{NETWORK}.0/24", "dev", INTERFACE, "congctl", self._congestion)
            ip("-n", self.names[host], "route", "replace", *route)

    def _give_address(self, host: int) -> None:
        address = f"{self.addresses[host]}/24"
        ip("-n", self.names[host], "address", "add", address, "dev", INTERFACE)

    def _tell(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._emulator is not None
        assert self._emulator.stdin is not None
        with self._lock:
            self._emulator.stdin.write(json.dumps(command) + "\n")
            self._emulator.stdin.flush()
            answer = self._answer()
        if "error" in answer:
            raise ValueError(f"{command}: {answer['error']}")
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._emulator is not None
        assert self._emulator.stdout is not None
        watch = threading.Timer(_PATIENCE, self._emulator.kill)
        watch.start()
        line = self._emulator.stdout.readline()
        watch.cancel()
        if not line:
            code = self._emulator.wait()
            raise InternetError(f"the emulator has ended with exit code {code}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def unavailable() -> str:
    """Why the internet cannot be emulated here; empty: it can."""
    try:
        with Internet([Line()]):
            return ""
    except InternetError as error:
        return str(error)


def _checksum(message: bytes) -> int:
    total = sum(struct.unpack(f"!{len(message) // 2}H", message))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
