"""``torch-distro bench wan``: seconds of a training step between homes.

For each setting of ranks, lines, round trip and loss an internet is emulated on this machine, and
the same training script runs on its hosts with one backend after the other. The ranks share this
machine's cores, in the row `compute` too, where the script makes no process group at all.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch_distro._wan.internet import Internet, InternetError, Line
from torch_distro._wan.ranks import Ranks, RanksError, pinging

WEIGHTS = {"quickstart": 922_944, "124m": 124_439_808}
"""Model -> number of its weights, all fp32."""
BACKENDS = ("compute", "gloo", "powersgd", "bf16", "distro")
TOPOLOGIES = ("mesh", "hub")
RELAY_PORT = 5555
# Of the lines while the ranks start and make their first steps: the delay is already as asked.
WARM_MBIT = 1000.0
# DDP rebuilds its buckets after the first step, PowerSGD compresses from the third, and an exchange
# of distro travels during the next step.
WARM_STEPS = {"compute": 1, "gloo": 2, "bf16": 2, "powersgd": 4, "distro": 4}
# What is measured at least and at most, within the row's budget. More than the most changes the
# median by less than the runs differ.
FEWEST_STEPS, MOST_STEPS = 1, 30
# The steps are made in so many turns, each after steps of the same training without communication:
# what else the machine does then hits both alike. Fewer: less alike; more: more pauses, in which an
# exchange that is under way costs nothing.
TURNS = 5
# GiB of memory that a rank of the 124M model needs at its peak, by backend: what a run's `peak_gib`
# says, less what libraries share.
GIB_A_RANK = {"compute": 1.1, "gloo": 1.6, "powersgd": 3.0, "bf16": 2.1, "distro": 2.5}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all rows of one internet have in common."""

    ranks: int
    link: str  # Mbit/s up and down, as given: 100/10 is what providers call it, down first
    rtt_ms: float
    loss: float  # percent of the packets between two hosts
    congestion: str

    @property
    def down_up_mbit(self) -> tuple[float, float]:
        down, _, up = self.link.partition("/")
        return float(down), float(up)

    def line(self, queue_ms: float) -> Line:
        """Of each host, so that two of them together have the round trip and the loss."""
        down, up = self.down_up_mbit
        share = 1 - math.sqrt(1 - self.loss / 100)
        return Line(up, down, self.rtt_ms / 4, loss=share, queue_ms=queue_ms)


@dataclasses.dataclass(frozen=True)
class Contender:
    """What carries the gradients in a row."""

    backend: str
    topology: str = "-"
    delay: int | None = None  # DISTRO_DELAY

    def arguments(self) -> list[str]:
        """Of the training script."""
        if self.backend in ("powersgd", "bf16"):
            return ["--backend=gloo", f"--hook={self.backend}"]
        return [f"--backend={'none' if self.backend == 'compute' else self.backend}"]

    def copies_sent(self, ranks: int) -> float:
        """How often a rank sends what it has to say: around a ring, to each peer, to a relay."""
        if self.backend != "distro":
            return 2 * (ranks - 1) / ranks
        return 1 if self.topology == "hub" else ranks - 1

    def copies_received(self, ranks: int) -> float:
        return self.copies_sent(ranks) if self.backend != "distro" else ranks - 1

    def env(self, relay: str) -> dict[str, str]:
        if self.backend != "distro":
            return {}
        hub = {"DISTRO_TOPOLOGY": "hub", "DISTRO_RELAY": relay} if self.topology == "hub" else {}
        return {"DISTRO_INSECURE": "1", "DISTRO_DELAY": str(self.delay), **hub}

    def __str__(self) -> str:
        if self.backend != "distro":
            return self.backend
        return f"distro ({self.topology}, delay {self.delay})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bench's own options."""
    add = parser.add_argument
    add("--links", nargs="+", type=_link, default=["100/100"], metavar="DOWN/UP",
        help="Mbit/s of each rank's line (100/100)")  # fmt: skip
    add("--rtt", nargs="+", type=float, default=[100.0], metavar="MS",
        help="round trip of any two hosts in ms (100)")  # fmt: skip
    add("--loss", nargs="+", type=_percent, default=[0.0], metavar="PERCENT",
        help="packets lost between two hosts, in percent (0)")  # fmt: skip
    add("--ranks", nargs="+", type=int, default=[2], metavar="N", help="one a host (2)")
    add("--model", nargs="+", choices=WEIGHTS, default=["quickstart"],
        help="the quick start's GPT, or GPT-2 small's tensors with a stated time")  # fmt: skip
    add("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    add("--topologies", nargs="+", choices=TOPOLOGIES, default=TOPOLOGIES, help="of distro")
    add("--delays", nargs="+", type=int, choices=(0, 1), default=(1, 0), help="of distro")
    add("--congestion", nargs="+", choices=("cubic", "bbr", "reno"), default=[_kernels_own()],
        help=f"TCP's congestion control, of all hosts ({_kernels_own()})")  # fmt: skip
    add("--compute-seconds", type=float, default=0.3, help="of a step of 124m (0.3)")
    add("--measure-seconds", type=float, default=120.0,
        help="of a row; longer steps are computed from bytes and rate (120)")  # fmt: skip
    add("--queue-ms", type=float, default=100.0,
        help="what may wait before each line, as time (100)")  # fmt: skip
    add("--rate-limit", type=int, metavar="BYTES", help="DISTRO_RATE_LIMIT of the ranks")
    add("--ping", action="store_true", help="ping beside the training, idle and during the steps")
    add("--seed", type=int, default=1, help="of the losses (1)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print all rows; 1 if one of them failed, or nothing can be measured here."""
    rows: list[dict[str, Any]] = []
    try:
        for row in measure(arguments):
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    except InternetError as error:
        print(f"torch-distro bench wan: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        header = {
            "compute_seconds": arguments.compute_seconds,
            "queue_ms": arguments.queue_ms,
            "rate_limit": arguments.rate_limit,
            "seed": arguments.seed,
        }
        print(json.dumps({"results": rows, **header}, indent=1))
    else:
        _print(rows)
    return int(any("error" in row for row in rows))


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Row after row.

    Raises:
        InternetError: the internet cannot be emulated here.
    """
    message_bytes: dict[tuple[str, str], float] = {}
    for model in args.model:
        dense = 4 * WEIGHTS[model]
        message_bytes |= {(model, "compute"): 0, (model, "gloo"): dense, (model, "bf16"): dense / 2}
    for ranks, link, rtt, loss, congestion in itertools.product(
        args.ranks, args.links, args.rtt, args.loss, args.congestion
    ):
        setting = Setting(ranks, link, rtt, loss, congestion)
        server = Line(0, 0, rtt / 4, loss=setting.line(0).loss, queue_ms=args.queue_ms)
        with Internet(
            [setting.line(args.queue_ms)] * ranks, server, args.seed, congestion
        ) as internet:
            for model in args.model:
                yield from Rows(args, setting, internet, model, message_bytes).all()


class Rows:
    """The rows of one model in one setting.

    Args:
        message_bytes: model and backend -> bytes of what a rank has to say in a step. Measured rows
            add to it, and those that cannot be measured are computed from it.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        setting: Setting,
        internet: Internet,
        model: str,
        message_bytes: dict[tuple[str, str], float],
    ) -> None:
        self.args, self.setting, self.internet, self.model = args, setting, internet, model
        self.message_bytes = message_bytes
        self.compute = args.compute_seconds if model == "124m" else 0.0
        self.alone: Ranks | None = None  # the ranks of the row `compute`, which stay

    def all(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self.each()
        finally:
            if self.alone is not None:
                self.alone.close()

    def each(self) -> Iterator[dict[str, Any]]:
        for backend in BACKENDS:
            if backend not in self.args.backends:
                continue
            contenders = [Contender(backend)]
            if backend == "distro":
                contenders = [
                    Contender(backend, topology, delay)
                    for topology in self.args.topologies
                    for delay in self.args.delays
                ]
            for contender in contenders:
                yield self.row(contender)

    def row(self, contender: Contender) -> dict[str, Any]:
        setting = self.setting
        row = {
            "backend": contender.backend,
            "topology": contender.topology,
            "delay": contender.delay,
            **dataclasses.asdict(setting),
            "model": self.model,
        }
        why_not = self.why_not_measured(contender)
        if why_not:
            return row | self.computed(contender) | {"why_computed": why_not}
        print(f"{setting}, {self.model}: {contender}", file=sys.stderr, flush=True)
        try:
            measured = self.measured(contender)
        except RanksError as error:
            return row | {"step_seconds_median": None, "measured": False, "error": str(error)}
        if contender.backend == "compute":
            self.compute = measured["step_seconds_median"]
        else:
            sent = max(measured["bytes_up_a_step"]) / contender.copies_sent(setting.ranks)
            self.message_bytes.setdefault((self.model, contender.backend), sent)
        return row | measured

    def why_not_measured(self, contender: Contender) -> str:
        """Empty: it can be measured."""
        gib = GIB_A_RANK[contender.backend] if self.model == "124m" else 0.0
        needed = gib * self.setting.ranks
        if needed > _free_gib() and self.alone is not None:
            self.alone.close()  # rather no comparison in turns than no row
            self.alone = None
        if needed > (free := _free_gib()):
            return f"needs about {needed:.0f} GiB of memory, {free:.0f} are free"
        seconds = self.seconds_of_transfer(contender)
        # The first step after the change of the lines is not counted.
        if seconds is not None and 2 * seconds > self.args.measure_seconds:
            return f"two steps exceed --measure-seconds {self.args.measure_seconds:g}"
        return ""

    def seconds_of_transfer(self, contender: Contender) -> float | None:
        """Of a step's bytes at the rate of the line, and nothing else; None: they are not known."""
        message = self.message_bytes.get((self.model, contender.backend))
        if message is None:
            return None
        down, up = self.setting.down_up_mbit
        ranks = self.setting.ranks
        seconds_up = message * contender.copies_sent(ranks) * 8e-6 / up
        return max(seconds_up, message * contender.copies_received(ranks) * 8e-6 / down)

    def computed(self, contender: Contender) -> dict[str, Any]:
        """From bytes and rate. Of others than distro without any round trip: from below."""
        row: dict[str, Any] = {"step_seconds_median": None, "measured": False}
        seconds = self.seconds_of_transfer(contender)
        if seconds is None:
            return row
        if contender.backend == "distro":
            # The last byte travels to a peer, or to the relay and from there.
            seconds += self.setting.rtt_ms * 1e-3 / (1 if contender.topology == "hub" else 2)
        overlaps = contender.backend == "distro" and contender.delay == 1
        step = max(self.compute, seconds) if overlaps else self.compute + seconds
        message = self.message_bytes[self.model, contender.backend]
        ranks = self.setting.ranks
        return row | {
            "step_seconds_median": step,
            "bytes_up_a_step": [int(message * contender.copies_sent(ranks))] * ranks,
            "bytes_down_a_step": [int(message * contender.copies_received(ranks))] * ranks,
        }

    def measured(self, contender: Contender) -> dict[str, Any]:
        relay = f"tcp://{self.internet.addresses[self.setting.ranks]}:{RELAY_PORT}"
        env = contender.env(relay)
        if self.args.rate_limit and contender.backend == "distro":
            env["DISTRO_RATE_LIMIT"] = str(self.args.rate_limit)
        arguments = [
            *contender.arguments(),
            f"--model={self.model}",
            f"--compute-seconds={self.args.compute_seconds}",
        ]
        with contextlib.ExitStack() as stack:
            if contender.topology == "hub":
                stack.enter_context(_relay(self.internet))
            self.set_lines(warm=True)
            ranks = Ranks(self.internet, arguments, env)
            if contender.backend == "compute":
                self.alone = ranks
                return self.steps(ranks, None, WARM_STEPS["compute"])
            stack.callback(ranks.close)
            measured = self.steps(ranks, self.alone, WARM_STEPS[contender.backend])
            self.set_lines(warm=True)
            ranks.end(self.patience)
            return measured

    @property
    def patience(self) -> float:
        """Seconds after which ranks that do not answer hang."""
        return 180 + 4 * self.args.measure_seconds

    def set_lines(self, warm: bool) -> None:
        line = self.setting.line(self.args.queue_ms)
        if warm:
            line = dataclasses.replace(line, up_mbit=WARM_MBIT, down_mbit=WARM_MBIT, loss=0)
        for rank in range(self.setting.ranks):
            self.internet.set_line(rank, **dataclasses.asdict(line))

    def steps(self, ranks: Ranks, alone: Ranks | None, warm_steps: int) -> dict[str, Any]:
        """Let ranks make their first steps, then those that count, in turns with those alone."""
        ranks.step(warm_steps, self.patience)
        self.set_lines(warm=False)
        ping: dict[str, Any] = {}
        server = self.setting.ranks
        if self.args.ping:
            with pinging(self.internet, 0, server) as idle:
                time.sleep(3)
        # TCP finds the line's rate in these.
        settled = ranks.step(1, self.patience)
        if _slowest(settled) < self.args.measure_seconds / 10:
            settled = ranks.step(2, self.patience)
        fitting = int(self.args.measure_seconds / _slowest(settled))
        number = max(FEWEST_STEPS, min(MOST_STEPS, fitting))
        turns = min(TURNS, number) if alone else 1
        number -= number % turns
        answers, beside = [], []
        before = self.counters_at_rest()
        with pinging(self.internet, 0, server) if self.args.ping else _nothing() as during:
            for _ in range(turns):
                if alone is not None:
                    beside += alone.step(number // turns, self.patience)
                answers += ranks.step(number // turns, self.patience)
        after = self.counters_at_rest()
        if self.args.ping:
            ping = {"ping_ms_idle": _summary(idle), "ping_ms": _summary(during)}
        last = answers[-self.setting.ranks :]
        alike = {"compute_seconds_median": _median(beside)} if beside else {}
        return {
            "step_seconds_median": _median(answers),
            **alike,
            "measured": True,
            "steps": number,
            "bytes_up_a_step": _difference(before, after, "sent_bytes", number),
            "bytes_down_a_step": _difference(before, after, "received_bytes", number),
            "packets_lost": _difference(before, after, "lost_up", 1),
            "packets_dropped": _difference(before, after, "dropped_up", 1),
            "cpu_seconds_a_step": sum(a["cpu_seconds"] for a in answers)
            / (number * self.setting.ranks),
            **_seconds_inside(settled, last, number),
            "peak_gib": max(a["peak_kib"] for a in last) / 2**20,
            **ping,
        }

    def counters_at_rest(self) -> list[dict[str, int]]:
        """Of the ranks, when nothing is under way any more: a step's bytes are all in."""
        before: list[dict[str, int]] = []
        # Heartbeats go on for ever: the end is when little has gone in half a second.
        for _ in range(120):
            counters = self.internet.counters()[: self.setting.ranks]
            if before and all(
                new["sent_packets"] - old["sent_packets"] < 5
                for old, new in zip(before, counters, strict=True)
            ):
                break
            before = counters
            time.sleep(0.5)
        return counters


@contextlib.contextmanager
def _relay(internet: Internet) -> Iterator[None]:
    """A relay on the server, while the block runs."""
    assert internet.server is not None
    command = [sys.executable, "-m", "torch_distro", "relay"]
    command += ["--bind", f"tcp://0.0.0.0:{RELAY_PORT}", "--insecure"]
    process = internet.popen(internet.server, command, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def _nothing() -> Iterator[list[float | None]]:
    yield []


def _median(answers: list[dict[str, Any]]) -> float:
    """Of all steps of all ranks, in seconds."""
    return statistics.median(seconds for answer in answers for seconds in answer["seconds"])


def _slowest(answers: list[dict[str, Any]]) -> float:
    """Seconds of the last step on the rank that took longest."""
    return float(max(answer["seconds"][-1] for answer in answers))


def _difference(
    before: list[dict[str, int]], after: list[dict[str, int]], name: str, steps: int
) -> list[int]:
    """By rank, of one step."""
    return [(new[name] - old[name]) // steps for old, new in zip(before, after, strict=True)]


def _seconds_inside(
    before: list[dict[str, Any]], after: list[dict[str, Any]], steps: int
) -> dict[str, float]:
    """Of a step, on the rank where it is most: what distro counts of its own work."""
    if "stats" not in after[0]:
        return {}
    names = ("encode_seconds", "decode_seconds", "wait_seconds")
    return {
        f"{name}_a_step": max(
            new["stats"][name] - old["stats"][name] for old, new in zip(before, after, strict=True)
        )
        / steps
        for name in names
    }


def _summary(times: list[float | None]) -> dict[str, float]:
    known = sorted(1000 * seconds for seconds in times if seconds is not None)
    if not known:
        return {"lost": len(times)}
    return {
        "median": statistics.median(known),
        "p95": known[int(0.95 * (len(known) - 1))],
        "lost": len(times) - len(known),
    }


def _free_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kib) / 2**20


def _kernels_own() -> str:
    return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()


def _link(text: str) -> str:
    parts = text.split("/")
    try:
        if len(parts) == 2 and all(float(part) > 0 for part in parts):
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not two rates in Mbit/s, as 100/10")


def _percent(text: str) -> float:
    percent = float(text.removesuffix("%"))
    if not 0 <= percent < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage from 0 to below 100")
    return percent


def _print(rows: list[dict[str, Any]]) -> None:
    print(f"{'model':11}{'ranks':>6}{'link':>9}{'rtt':>6}{'loss':>6}  {'backend':24}{'step':>10}")
    for row in rows:
        name = str(Contender(row["backend"], row["topology"], row["delay"]))
        seconds = row["step_seconds_median"]
        step = "-" if seconds is None else f"{seconds:.3f} s"
        note = "" if row["measured"] else f"  {row.get('error') or 'computed'}"
        print(
            f"{row['model']:11}{row['ranks']:6}{row['link']:>9}{row['rtt_ms']:6g}"
            f"{row['loss']:5g}%  {name:24}{step:>10}{note}"
        )
