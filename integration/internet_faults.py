"""Faults of the internet and of those who train on it, drawn by a seed and injected into a run.

A fault is a generator: what it yields are seconds until it goes on, and at its end, or when it is
closed, all is as before. `Field` is what they act on. `integration/fault_campaign.py` uses both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from bench_strangers import GREETING, HUGE_FRAME, READY
from torch_distro._wan.internet import EMULATOR, Internet, Line
from torch_distro._wan.namespaces import ip

Fault = Generator[float, None, None]

RELAY = Path(EMULATOR).with_name("torch-distro-relay")
RELAY_PORT = 29600
RANK_PORT = 29700  # the first that a rank binds, if it binds one
# A host's first address that is no longer in use, as last byte; each move takes the next.
FIRST_MOVED = 100
LAST_MOVED = 250


class NotPossibleError(RuntimeError):
    """A fault that would change nothing at this moment: it is not counted."""


class Field:
    """The hosts of a run, what is on them, and what is wrong with them at the moment.

    Faults overlap: of two that do the same to the same, the last to end puts it right.

    Args:
        internet: ranks and a server.
        base: the line of each host without a fault.
        relay: starts the relay on the server, where everything goes by one; None: a mesh.
    """

    def __init__(
        self,
        internet: Internet,
        base: Line,
        relay: Callable[[], subprocess.Popen[str]] | None,
    ) -> None:
        assert internet.server is not None
        self.internet, self.base = internet, base
        self.server = internet.server
        self.hub = relay is not None
        self.ranks: list[subprocess.Popen[str]] = []
        self.start_relay = relay
        self.relay: subprocess.Popen[str] | None = None
        self.homes = list(internet.addresses)
        self._held: Counter[tuple[int, object]] = Counter()
        self._moved = FIRST_MOVED

    @contextlib.contextmanager
    def holding(
        self, host: int, what: object, do: Callable[[], None], undo: Callable[[], None]
    ) -> Iterator[None]:
        """`do` before the block and `undo` after it, unless another holds the same there."""
        self._held[host, what] += 1
        if self._held[host, what] == 1:
            do()
        try:
            yield
        finally:
            self._held[host, what] -= 1
            if self._held[host, what] == 0:
                undo()

    def changed(self, host: int, **changes: float) -> contextlib.ExitStack:
        """While the block runs, a host's line is worse than it is."""
        stack = contextlib.ExitStack()
        for name, value in changes.items():
            stack.enter_context(
                self.holding(
                    host,
                    name,
                    lambda name=name, value=value: self.internet.set_line(host, **{name: value}),  # type: ignore[misc]
                    lambda name=name: self.internet.set_line(  # type: ignore[misc]
                        host, **{name: getattr(self.base, name)}
                    ),
                )
            )
        return stack

    def cut(self, host: int, peer: int | None = None) -> contextlib.AbstractContextManager[None]:
        """While the block runs, nothing passes a host's line, or between two hosts."""
        first, second = (host, peer) if peer is None else (min(host, peer), max(host, peer))
        day = 86_400.0
        return self.holding(
            first,
            ("cut", second),
            lambda: self.internet.cut(first, day, second),
            lambda: self.internet.cut(first, 0, second),
        )

    def stopped(self, host: int) -> contextlib.AbstractContextManager[None]:
        """While the block runs, what runs on a host does not."""
        return self.holding(
            host,
            "stopped",
            lambda: self.signal(host, signal.SIGSTOP),
            lambda: self.signal(host, signal.SIGCONT),
        )

    def signal(self, host: int, number: signal.Signals) -> None:
        process = self.relay if host == self.server else self.ranks[host]
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def reset(self, host: int, peer: int) -> int:
        """End the connections between two hosts at one of them; the other is told, if it can be.

        Torch's own to its store stay. How many there were.
        """
        ways = ["dst", self.internet.addresses[peer]]
        if self.server in (host, peer):
            ways += [f"( sport = :{RELAY_PORT} or dport = :{RELAY_PORT} )"]
        command = ["ip", "netns", "exec", self.internet.names[host]]
        ended = subprocess.run(
            [*command, "ss", "--kill", "--no-header", "--tcp", "--numeric", *ways],
            capture_output=True,
            text=True,
            check=False,
        )
        return len(ended.stdout.splitlines())

    def move(self, host: int) -> None:
        """The host's address is another from now on."""
        address = f"{self.homes[host].rsplit('.', 1)[0]}.{self._moved}"
        self._moved = self._moved + 1 if self._moved < LAST_MOVED else FIRST_MOVED
        self.internet.move(host, address)

    def go_home(self) -> None:
        """All hosts have their first addresses again."""
        for host, home in enumerate(self.homes):
            if self.internet.addresses[host] != home:
                self.internet.move(host, home)

    def restart_relay(self) -> None:
        assert self.start_relay is not None
        self.relay = self.start_relay()


@dataclasses.dataclass(frozen=True)
class Plan:
    """A fault that was drawn.

    Args:
        kind: a name in KINDS.
        step: of the training, at which it begins.
        wait: seconds after that.
        host: who has it; the server stands for the relay.
        peer: the other end, of those that are between two.
        seconds: how long it takes.
        strength: from 0 to 1, of those that have one.
        seed: of what it draws itself.
    """

    kind: str
    step: int
    wait: float
    host: int
    peer: int
    seconds: float
    strength: float
    seed: int

    def __str__(self) -> str:
        ends = f"{self.host}-{self.peer}" if self.kind in BETWEEN_TWO else f"{self.host}"
        strength = f", strength {self.strength:.2f}" if self.kind in WITH_STRENGTH else ""
        return f"{self.kind} {ends} for {self.seconds:.2f} s{strength}"

    def begin(self, field: Field) -> Fault:
        return KINDS[self.kind].run(field, self)


def cut_line(field: Field, plan: Plan) -> Fault:
    with field.cut(plan.host):
        yield plan.seconds


def cut_pair(field: Field, plan: Plan) -> Fault:
    with field.cut(plan.host, plan.peer):
        yield plan.seconds


def reset(field: Field, plan: Plan) -> Fault:
    if field.reset(plan.host, plan.peer) == 0:
        raise NotPossibleError
    yield 0


def half_open(field: Field, plan: Plan) -> Fault:
    """One end's connection goes while nothing passes: the other's stands, with nobody behind it."""
    with field.cut(plan.host, plan.peer):
        if field.reset(plan.host, plan.peer) == 0:
            raise NotPossibleError
        yield plan.seconds


def freeze(field: Field, plan: Plan) -> Fault:
    with field.stopped(plan.host):
        yield plan.seconds


def slow(field: Field, plan: Plan) -> Fault:
    """The processor is somebody else's most of the time."""
    rest = plan.seconds
    while rest > 0:
        with field.stopped(plan.host):
            yield 0.15
        yield 0.05
        rest -= 0.2


def loss(field: Field, plan: Plan) -> Fault:
    with field.changed(plan.host, loss=0.02 + 0.3 * plan.strength):
        yield plan.seconds


def reorder(field: Field, plan: Plan) -> Fault:
    with field.changed(plan.host, reorder=0.05 + 0.45 * plan.strength):
        yield plan.seconds


def duplicate(field: Field, plan: Plan) -> Fault:
    with field.changed(plan.host, duplicate=0.05 + 0.45 * plan.strength):
        yield plan.seconds


def crawl(field: Field, plan: Plan) -> Fault:
    """The line is shared with a download, and far away."""
    with field.changed(
        plan.host, up_mbit=1 + plan.strength, down_mbit=2, delay_ms=100, jitter_ms=50
    ):
        yield plan.seconds


def move(field: Field, plan: Plan) -> Fault:
    """For good: nobody answers at the old address, and nobody says so."""
    field.move(plan.host)
    yield 0


def relay_restart(field: Field, plan: Plan) -> Fault:
    if field.relay is None or field.relay.poll() is not None:
        raise NotPossibleError
    field.relay.kill()
    field.relay.wait()
    try:
        yield plan.seconds
    finally:
        field.restart_relay()


def strangers(field: Field, plan: Plan) -> Fault:
    """Connections to a port of ours that say nothing, too little or rubbish."""
    rng = random.Random(plan.seed)
    port = RELAY_PORT if plan.host == field.server else RANK_PORT
    with contextlib.ExitStack() as stack:
        lines = []
        for _ in range(20):
            line = stack.enter_context(field.internet.socket(plan.peer, socket.SOCK_STREAM))
            line.setblocking(False)
            line.connect_ex((field.internet.addresses[plan.host], port))
            lines.append(line)
        yield 0.5  # until they are connected
        for line in lines:
            frame = rng.randbytes(rng.randrange(1, 200))
            says = (
                b"",
                rng.randbytes(rng.randrange(1, 2000)),
                GREETING[: rng.randrange(len(GREETING))],
                GREETING + READY + HUGE_FRAME,
                GREETING + READY + 5 * (bytes([0, len(frame)]) + frame),
                # Says that it has a key.
                GREETING.replace(b"NULL\0", b"CURVE", 1) + frame,
            )[rng.randrange(6)]
            with contextlib.suppress(OSError):
                line.send(says)
        yield 0.5


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fault: how often it is drawn beside others, and how long it takes in seconds."""

    run: Callable[[Field, Plan], Fault]
    weight: float
    seconds: tuple[float, float]


KINDS = {
    "cut_line": Kind(cut_line, 4, (0.2, 3)),
    "cut_pair": Kind(cut_pair, 3, (0.2, 3)),
    "reset": Kind(reset, 5, (0, 0)),
    "half_open": Kind(half_open, 3, (0.2, 2)),
    "freeze": Kind(freeze, 2, (0.2, 3)),
    "slow": Kind(slow, 1, (1, 4)),
    "loss": Kind(loss, 2, (1, 4)),
    "reorder": Kind(reorder, 2, (1, 4)),
    "duplicate": Kind(duplicate, 2, (1, 4)),
    "crawl": Kind(crawl, 1, (1, 4)),
    "move": Kind(move, 0.3, (0, 0)),
    "relay_restart": Kind(relay_restart, 3, (0, 3)),
    "strangers": Kind(strangers, 2, (1, 1)),
}
WITH_STRENGTH = ("loss", "reorder", "duplicate", "crawl")
BETWEEN_TWO = ("cut_pair", "reset", "half_open")
# What a campaign of some length has at least once in each topology, kind and seconds: outages from
# which TCP recovers by itself, and one that is longer than its patience and ours.
LONG = (("cut_line", 5.0), ("cut_line", 25.0), ("cut_line", 60.0), ("freeze", 10.0), ("move", 0.0))


def draw(rng: random.Random, kinds: Sequence[str], ranks: int, hub: bool, step: int) -> Plan:
    """One fault of some kinds at a step; everything else about it by `rng`."""
    kinds = [name for name in kinds if hub or name != "relay_restart"]
    kind = rng.choices(kinds, [KINDS[name].weight for name in kinds])[0]
    return of_kind(rng, kind, ranks, hub, step, rng.uniform(*KINDS[kind].seconds))


def of_kind(
    rng: random.Random, kind: str, ranks: int, hub: bool, step: int, seconds: float
) -> Plan:
    """One fault of a kind, the rest by `rng`."""
    server = ranks
    host, peer = rng.sample(range(ranks), 2)
    if hub and kind in BETWEEN_TWO:
        host, peer = (host, server) if rng.random() < 0.5 else (server, host)
    if hub and kind in ("cut_line", "freeze", "loss", "reorder", "duplicate", "crawl"):
        host = rng.randrange(ranks + 1)
    if kind == "relay_restart":
        host = server
    if kind == "strangers":
        host, peer = (server, peer) if hub else (rng.randrange(ranks), server)
    if kind == "move" and not hub:
        host = ranks - 1  # it dials the others: nobody dials it
    return Plan(
        kind=kind,
        step=step,
        wait=rng.uniform(0, 1.5) if rng.random() < 0.5 else 0.0,
        host=host,
        peer=peer,
        seconds=seconds,
        strength=rng.random(),
        seed=rng.getrandbits(32),
    )


def missing() -> str:
    """What the faults need beside an internet and is not here; empty: nothing."""
    if not RELAY.exists():
        return f"{RELAY} is missing: the package was built without its programs"
    try:
        ip("-Version")
        subprocess.run(["ss", "-V"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"the commands `ip` and `ss` of iproute2 are needed: {error}"
    return "" if os.geteuid() == 0 else "root is needed"
