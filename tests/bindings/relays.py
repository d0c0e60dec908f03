"""A `torch-distro relay` of its own for a test."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


class Relay:
    """The command, until close(); with keys where there is a folder of them.

    Args:
        keys: a folder that `torch-distro keygen --relay` made.
        port: 0: any free one.
    """

    def __init__(self, keys: Path | None = None, port: int = 0) -> None:
        command = [sys.executable, "-m", "torch_distro", "relay", "--json", "--report-seconds=0"]
        if keys:
            command += ["--secret", str(keys / "relay.key"), "--peers", str(keys / "peers.txt")]
        self._process = subprocess.Popen(
            [*command, f"--bind=tcp://127.0.0.1:{port}"], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.endpoint: str = json.loads(self._process.stdout.readline())["endpoint"]
        self.port = int(self.endpoint.rpartition(":")[2])
        self.env = {"DISTRO_TOPOLOGY": "hub", "DISTRO_RELAY": self.endpoint}

    def kill(self) -> None:
        """At once, as a crash does. Idempotent."""
        self._process.kill()
        self._process.wait()

    def close(self) -> dict[str, Any]:
        """End it; what it counted."""
        self._process.send_signal(signal.SIGTERM)
        output, _ = self._process.communicate(timeout=30)
        counters: dict[str, Any] = json.loads(output.splitlines()[-1])
        return counters
