"""Network namespaces that live as long as somebody needs them. Root and the command `ip`."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import secrets
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

_NAME = re.compile(r"distro-(\d+)-")
_CLONE_NEWNET = 0x40000000


def ip(*arguments: str) -> str:
    """What the command `ip` prints.

    Raises:
        OSError: it fails, or there is none.
    """
    ended = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {ended.stderr.strip()} (are you root?)")
    return ended.stdout


class Namespaces:
    """Network namespaces of this process, until close(), or its end.

    Those that a killed process has left are removed at the next start.

    Args:
        labels: one a namespace; its name holds it.

    Raises:
        OSError: they cannot be made; root and the command `ip` are needed.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        remove_left_over()
        mine = f"distro-{os.getpid()}-{secrets.token_hex(2)}"
        self.names = [f"{mine}-{label}" for label in labels]
        atexit.register(self.close)
        try:
            for name in self.names:
                ip("netns", "add", name)
                # No router solicitations and the like: what is counted is what programs send.
                self.exec(name, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
                ip("-n", name, "link", "set", "lo", "up")
        except OSError:
            self.close()
            raise

    def exec(self, name: str, *command: str) -> None:
        """Run a short command in one of them.

        Raises:
            OSError: it fails.
        """
        ip("netns", "exec", name, *command)

    def socket(self, name: str, kind: socket.SocketKind, protocol: int = 0) -> socket.socket:
        """An IPv4 socket of this process that lives in one of them.

        Raises:
            OSError: it cannot be made.
        """
        made: list[socket.socket | OSError] = []

        def make() -> None:  # only this thread enters, and it ends here
            try:
                with open(f"/run/netns/{name}") as there:
                    libc = ctypes.CDLL(None, use_errno=True)
                    if libc.setns(there.fileno(), _CLONE_NEWNET) != 0:
                        number = ctypes.get_errno()
                        raise OSError(number, f"setns {name}: {os.strerror(number)}")
                made.append(socket.socket(socket.AF_INET, kind, protocol))
            except OSError as error:
                made.append(error)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if isinstance(made[0], OSError):
            raise made[0]
        return made[0]

    def close(self) -> None:
        """Kill the processes in them and remove them. Idempotent."""
        atexit.unregister(self.close)
        for name in self.names:
            _remove(name)


def remove_left_over() -> None:
    """Remove the namespaces of processes that are no more."""
    folder = Path("/run/netns")
    for path in folder.iterdir() if folder.is_dir() else ():
        if (found := _NAME.match(path.name)) and not Path("/proc", found[1]).exists():
            _remove(path.name)


def _remove(name: str) -> None:
    if not Path("/run/netns", name).exists():
        return
    with contextlib.suppress(OSError):
        for process in ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM raises SystemExit, so that what is open is closed."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    takes = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if takes:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if takes:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
