"""Hosts with home lines, emulated: times, rates, losses, cuts, NAT, and that nothing stays."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch_distro._wan import namespaces
from torch_distro._wan.internet import EMULATOR, Internet, Line, unavailable

REASON = unavailable()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

PORT = 5000


@pytest.fixture
def internet() -> Iterator[Internet]:
    """Two ranks, 10 ms from the middle of the internet, and a server there."""
    lines = [Line(up_mbit=40, down_mbit=40, delay_ms=10), Line(delay_ms=10)]
    with Internet(lines, server=Line(0, 0, 0)) as made:
        yield made


def namespaces_of(process: int) -> list[str]:
    return [path.name for path in Path("/run/netns").glob(f"distro-{process}-*")]


def connected(internet: Internet, host: int, peer: int) -> tuple[socket.socket, socket.socket]:
    """The two ends of a TCP connection that `host` opens."""
    with internet.socket(peer, socket.SOCK_STREAM) as server:
        server.bind((internet.addresses[peer], 0))
        server.listen()
        server.settimeout(10)
        client = internet.socket(host, socket.SOCK_STREAM)
        client.settimeout(10)
        client.connect((internet.addresses[peer], server.getsockname()[1]))
        accepted, _ = server.accept()
    accepted.settimeout(10)
    return client, accepted


def megabits_a_second(sender: socket.socket, receiver: socket.socket, size: int) -> float:
    """Of a transfer, from its first byte sent to its last received."""

    def send() -> None:
        sender.sendall(bytes(size))

    thread = threading.Thread(target=send)
    begin = time.monotonic()
    thread.start()
    received = 0
    while received < size:
        received += len(receiver.recv(1 << 18))
    seconds = time.monotonic() - begin
    thread.join()
    return size * 8e-6 / seconds


def test_a_ping_takes_the_delays_of_both_lines_there_and_back(internet: Internet) -> None:
    best = min(internet.ping(0, 1) or 9 for _ in range(5))
    assert 0.040 <= best < 0.2
    assert internet.server == 2
    best = min(internet.ping(2, 1) or 9 for _ in range(5))
    assert 0.020 <= best < 0.1


def test_a_change_of_delay_is_seen_by_the_next_packet(internet: Internet) -> None:
    internet.set_line(1, delay_ms=100)
    assert 0.220 <= (internet.ping(0, 1) or 9) < 1
    with pytest.raises(ValueError, match="delay"):
        internet.set_line(1, delay_ms=-1)
    with pytest.raises(ValueError, match="speed"):
        internet.set_line(1, speed=3)


@pytest.mark.parametrize("congestion", ["cubic", "bbr"])
def test_a_transfer_has_the_rate_of_the_line(congestion: str) -> None:
    lines = [Line(40, 40, 10), Line(100, 100, 10)]
    with Internet(lines, congestion=congestion) as internet:  # type: ignore[arg-type]
        client, accepted = connected(internet, 0, 1)
        with client, accepted:
            chosen = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
            assert chosen.rstrip(b"\0").decode() == congestion
            rate = megabits_a_second(client, accepted, 10_000_000)
        # Never more, on any machine; a busy one delays what TCP waits for.
        assert 20 <= rate <= 42
        mine, peer = internet.counters()
        assert mine["sent_bytes"] >= peer["received_bytes"] > 10_000_000


def test_what_the_line_does_not_carry_is_dropped_before_it(internet: Internet) -> None:
    internet.set_line(0, up_mbit=1, queue_ms=50)
    with internet.socket(0, socket.SOCK_DGRAM) as sender:
        for _ in range(200):
            sender.sendto(bytes(1000), (internet.addresses[1], PORT))
    while (counters := internet.counters()[0])["dropped_up"] + counters["sent_packets"] < 200:
        time.sleep(0.01)
    assert counters["dropped_up"] > 150


def test_losses_are_counted_and_drawn_by_the_seed() -> None:
    def received(seed: int) -> list[int]:
        with Internet([Line(0, 0, 1, loss=0.2), Line(0, 0, 1)], seed=seed) as internet:
            with (
                internet.socket(0, socket.SOCK_DGRAM) as sender,
                internet.socket(1, socket.SOCK_DGRAM) as receiver,
            ):
                receiver.bind((internet.addresses[1], PORT))
                for number in range(200):
                    sender.sendto(bytes([number]), (internet.addresses[1], PORT))
                internet.ping(1, 1)
                receiver.settimeout(0.5)
                numbers = []
                while True:
                    try:
                        numbers.append(receiver.recv(16)[0])
                    except TimeoutError:
                        break
            counters = internet.counters()[0]
            assert counters["sent_packets"] == 200
            assert counters["lost_up"] == 200 - len(numbers) > 0
            return numbers

    first = received(7)
    assert received(7) == first
    assert received(8) != first


def test_a_cut_line_is_a_black_hole_and_comes_back(internet: Internet) -> None:
    internet.cut(0, 3600)
    assert internet.ping(0, 1, timeout=0.3) is None
    assert internet.ping(1, 0, timeout=0.3) is None
    assert internet.ping(1, 2) is not None
    counters = internet.counters()[0]
    assert counters["cut_up"] >= 1
    assert counters["cut_down"] >= 1
    internet.cut(0, 0)
    assert internet.ping(0, 1) is not None
    internet.cut(0, 3600, peer=1)
    assert internet.ping(0, 1, timeout=0.3) is None
    assert internet.ping(0, 2) is not None


def test_a_connection_outlives_a_cut(internet: Internet) -> None:
    client, accepted = connected(internet, 0, 1)
    with client, accepted:
        internet.cut(0, 0.5)
        client.sendall(b"late")
        assert accepted.recv(16) == b"late"
    assert internet.counters()[0]["cut_up"] >= 1


def test_behind_nat_nobody_is_reached_but_everybody_can_be(internet: Internet) -> None:
    internet.set_line(0, nat=True)
    internet.set_line(1, nat=True)
    server = internet.server
    assert server is not None
    for host, peer in ((1, 0), (server, 0)):
        with (
            internet.socket(peer, socket.SOCK_STREAM) as listening,
            internet.socket(host, socket.SOCK_STREAM) as client,
        ):
            listening.bind((internet.addresses[peer], PORT))
            listening.listen()
            client.settimeout(0.5)
            with pytest.raises(TimeoutError):
                client.connect((internet.addresses[peer], PORT))
    assert internet.counters()[0]["refused"] >= 2
    for host in (0, 1):
        client, accepted = connected(internet, host, server)
        with client, accepted:
            accepted.sendall(b"answer")
            assert client.recv(16) == b"answer"


def test_a_host_moves_to_another_address(internet: Internet) -> None:
    internet.move(0, "10.78.0.99")
    assert internet.ping(1, 0) is not None
    assert internet.ping(0, 1) is not None
    with pytest.raises(ValueError, match="address"):
        internet.move(0, internet.addresses[1])


def test_a_program_runs_on_its_host_and_sees_nothing_else(internet: Internet) -> None:
    code = (
        "import os, socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
        f"s.connect(('{internet.addresses[1]}', 9)); print(s.getsockname()[0], os.environ['X'],"
        " 'DISTRO_MODE' in os.environ, [name for _, name in socket.if_nameindex()])"
    )
    os.environ["DISTRO_MODE"] = "dense"
    try:
        ended = internet.run(0, [sys.executable, "-c", code], {"X": "y"}, timeout=60)
    finally:
        del os.environ["DISTRO_MODE"]
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == f"{internet.addresses[0]} y False ['lo', 'line']"
    # There is no way out of the namespaces.
    ended = internet.run(0, ["ip", "route", "get", "192.0.2.1"], timeout=60)
    assert ended.returncode != 0


def test_nothing_is_left_whatever_ends_it(tmp_path: Path) -> None:
    with Internet([Line(), Line()]) as internet:
        assert len(namespaces_of(os.getpid())) == 2
        sleeper = internet.popen(0, ["sleep", "3600"])
    assert namespaces_of(os.getpid()) == []
    assert sleeper.wait(10) == -signal.SIGKILL
    with pytest.raises(RuntimeError, match="on purpose"), Internet([Line()]):
        raise RuntimeError("on purpose")
    assert namespaces_of(os.getpid()) == []

    program = tmp_path / "program.py"
    program.write_text(
        "import time\n"
        "from torch_distro._wan.internet import Internet, Line\n"
        "with Internet([Line(), Line()]) as internet:\n"
        "    internet.popen(0, ['sleep', '3600'])\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(3600)\n"
    )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, str(program)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # A shell starts what runs in the background deaf to SIGINT, and so its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == "ready\n"
        assert len(namespaces_of(process.pid)) == 2
        process.send_signal(number)
        process.wait(30)
        if number == signal.SIGKILL:
            namespaces.remove_left_over()  # as the next internet does
        assert namespaces_of(process.pid) == []


def test_the_emulator_says_what_it_lacks() -> None:
    command = [str(EMULATOR), "--namespaces=distro-none", "--addresses=10.0.0.1"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 1
    assert "ip netns add" in json.loads(ended.stdout)["error"]
    ended = subprocess.run(
        [*command, "--addresses=10.0.0.2"], capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode == 1
    assert "differ in number" in json.loads(ended.stdout)["error"]


def test_many_hosts() -> None:
    with Internet([Line(delay_ms=1) for _ in range(32)]) as internet:
        assert internet.ping(0, 31) is not None
        assert len(internet.counters()) == 32
