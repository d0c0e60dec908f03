"""Strangers who storm a relay while two ranks train through it: what it costs the relay.

    .venv/bin/python integration/bench_strangers.py --attempts 50000 --seconds 60

Prints JSON: how many connections were tried in which time, the relay's memory before and at its
peak, what it counted, and whether the training ended well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from launch import Ended, torchrun

HERE = Path(__file__).parent
# ZMTP 3.1: a greeting of the NULL mechanism; the READY command of a DEALER.
GREETING = bytes([0xFF, *[0] * 8, 0x7F, 3, 1]) + b"NULL".ljust(20, b"\0") + bytes(32)
READY_BODY = b"\x05READY\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"
READY = bytes([4, len(READY_BODY)]) + READY_BODY
HUGE_FRAME = bytes([2]) + (1 << 31).to_bytes(8, "big")  # announced, never sent


class Storm:
    """Connections of strangers, until `attempts` are made or the time is over."""

    def __init__(self, port: int, attempts: int, seconds: float, seed: int) -> None:
        self.port, self.attempts, self.seconds = port, attempts, seconds
        self.random = random.Random(seed)
        self.made = self.failed = 0
        self.elapsed = 0.0

    def once(self) -> None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), timeout=2) as line,
        ):
            line.settimeout(0.2)
            manner = self.random.randrange(5)
            if manner == 1:
                line.sendall(self.random.randbytes(self.random.randrange(2000)))
            elif manner == 2:
                line.sendall(GREETING[: self.random.randrange(len(GREETING))])
            elif manner >= 3:
                line.sendall(GREETING + READY)
                frame = self.random.randbytes(self.random.randrange(1, 200))
                garbage = bytes([0, len(frame)]) + frame
                line.sendall(HUGE_FRAME if manner == 3 else 5 * garbage)
            self.made += 1
            return
        self.failed += 1

    def run(self) -> None:
        begin = time.monotonic()
        while self.made + self.failed < self.attempts and self.elapsed < self.seconds:
            self.once()
            self.elapsed = time.monotonic() - begin


def resident_bytes(pid: int) -> int:
    """Memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def start_relay(arguments: list[str]) -> tuple[subprocess.Popen[str], str]:
    """The relay and its endpoint."""
    command = [sys.executable, "-m", "torch_distro", "relay", "--bind", "tcp://127.0.0.1:0"]
    relay = subprocess.Popen(
        [*command, "--json", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert relay.stdout is not None
    return relay, str(json.loads(relay.stdout.readline())["endpoint"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attempts", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=400, help="of the training beside it")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    print(f"seed {args.seed}", file=sys.stderr)

    relay, endpoint = start_relay([])
    storm = Storm(int(endpoint.rsplit(":", 1)[1]), args.attempts, args.seconds, args.seed)
    ended: list[Ended] = []

    def train(folder: Path) -> None:
        arguments = ["--backend", "distro", "--steps", str(args.steps), "--layers", "1"]
        arguments += ["--width", "48", "--heads", "4", "--eval-windows", "32"]
        env = {"DISTRO_TOPOLOGY": "hub", "DISTRO_RELAY": endpoint}
        ended.append(torchrun(HERE / "train_gpt.py", arguments, 2, env, folder))

    with tempfile.TemporaryDirectory() as folder:
        training = threading.Thread(target=train, args=(Path(folder),))
        training.start()
        time.sleep(1.0)
        before = peak = resident_bytes(relay.pid)
        storming = threading.Thread(target=storm.run)
        storming.start()
        while storming.is_alive():
            peak = max(peak, resident_bytes(relay.pid))
            time.sleep(0.05)
        storming.join()
        training.join()
        peak = max(peak, resident_bytes(relay.pid))
    relay.send_signal(signal.SIGTERM)
    output, _ = relay.communicate()
    counters: dict[str, Any] = json.loads(output.splitlines()[-1])
    print(
        json.dumps(
            {
                "attempts": storm.made + storm.failed,
                "connected": storm.made,
                "seconds": round(storm.elapsed, 1),
                "relay_bytes_before": before,
                "relay_bytes_peak": peak,
                "growth_mb": round((peak - before) / 1e6, 1),
                "relay": counters,
                "training_succeeded": ended[0].succeeded,
                "training": ended[0].why_not(),
            },
            indent=1,
        )
    )
    sys.exit(0 if ended[0].succeeded else 1)


if __name__ == "__main__":
    main()
