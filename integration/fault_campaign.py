"""Faults, hundreds of them, during trainings over an emulated internet: nothing may come of them.

    sudo .venv/bin/python integration/fault_campaign.py --faults 320 --seed 1

Three ranks and a server, each in a network namespace; keys everywhere. Trainings that nothing
disturbs come first; then trainings with faults (internet_faults.py) that have to end with the same
bits; then trainings of which a rank is lost for good, whose other ranks have to say which, within
the group's time-out. Needs root, /dev/net/tun and iproute2.

Prints one JSON. The exit code is 0 if nothing went wrong, 1 if something did, 2 if it cannot run
here. What is drawn depends on the seed alone; when it hits, on real time as well. Of what went
wrong, the output of all ranks is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internet_faults import (
    KINDS,
    LONG,
    RANK_PORT,
    RELAY,
    RELAY_PORT,
    Fault,
    Field,
    NotPossibleError,
    Plan,
    draw,
    missing,
    of_kind,
)
from torch_distro._wan.internet import Internet, InternetError, Line

HERE = Path(__file__).parent
RANKS = 3
STORE_PORT = 29500
BASE = Line(up_mbit=100, down_mbit=100, delay_ms=3)
MODEL = (
    *("--layers", "1", "--width", "48", "--heads", "4", "--batch", "2", "--block", "32"),
    *("--eval-windows", "32", "--eval-every", "1000000"),
)
# Of a training with faults. More: a campaign takes longer between them; fewer: few hit it at work.
FAULTS_A_TRAINING = 40
STEPS_A_FAULT = 6
# Drawn for each that is to be counted: some have nothing to do when their time comes.
SPARE = 1.15
# After so many trainings that went wrong there is no point in going on.
ENOUGH = 3
# Seconds without a step and without a fault until a training counts as hanging: more than all that
# a rank waits for by itself after an outage (30 s until it takes a silent connection for dead, ten
# between tries to dial), twice, on a busy machine.
HANGS_AFTER = 150.0
# Seconds until a training has begun, or has come to its end after the last step.
SLOW_START = 180.0
# A killed rank: the group's time-out in seconds, and what the others may take until they have ended
# once it is over.
TIMEOUT = 20.0
SLACK = 20.0
# Torch's errors of distributed training, at the end of a traceback.
TYPED = re.compile(r"^(?:\[rank\d+\]: ?)?torch\.distributed\.Dist\w*Error: (.*)", re.MULTILINE)
PROGRESS = re.compile(r"(\d+)/\d+ \[")
STORE = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore(sys.argv[1], int(sys.argv[2]), is_master=True, wait_for_workers=False)
print("ready", flush=True)
time.sleep(1e6)
"""


def tell(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a training runs over, and what crosses the wire."""

    topology: str
    mode: str

    def __str__(self) -> str:
        return f"{self.topology}/{self.mode}"


@dataclasses.dataclass
class Outcome:
    """What a training has come to; `wrong` is empty if all is well."""

    wrong: list[str] = dataclasses.field(default_factory=list)
    hangs: int = 0
    result: dict[str, Any] | None = None
    faults: Counter[str] = dataclasses.field(default_factory=Counter)
    seconds: float = 0.0
    said: dict[str, Any] | None = None


@dataclasses.dataclass
class Running:
    """A fault that goes on `at` this time; `begun`: it has done something."""

    plan: Plan
    fault: Fault
    at: float
    begun: bool = False


class World:
    """The internet, the keys and torch's store of a campaign; a context manager."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.attempts = 0
        self.internet = Internet([BASE] * RANKS, server=BASE, seed=seed)
        self.keys = folder / "keys"
        keygen = RELAY.with_name("torch-distro-keygen")
        subprocess.run(
            [keygen, "--ranks", str(RANKS), "--relay", "--out", self.keys],
            check=True,
            capture_output=True,
        )

    def __enter__(self) -> World:
        self.internet.__enter__()
        try:
            self._store = self.internet.popen(
                self.server,
                [
                    sys.executable,
                    "-c",
                    STORE,
                    self.internet.addresses[self.server],
                    str(STORE_PORT),
                ],
                stdout=subprocess.PIPE,
            )
            assert self._store.stdout is not None
            if self._store.stdout.readline() != "ready\n":
                raise RuntimeError("torch's store has not begun")
        except BaseException:
            self.internet.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._store.kill()
        assert self._store.stdout is not None
        self._store.stdout.close()
        self.internet.close()

    @property
    def server(self) -> int:
        assert self.internet.server is not None
        return self.internet.server

    def relay(self, output: Path) -> subprocess.Popen[str]:
        command = [str(RELAY), "--bind", f"tcp://0.0.0.0:{RELAY_PORT}", "--log", "info"]
        command += ["--secret", str(self.keys / "relay.key")]
        command += ["--peers", str(self.keys / "peers.txt")]
        with output.open("a") as out:
            return self.internet.popen(self.server, command, stdout=out, stderr=subprocess.STDOUT)

    def rank(
        self, rank: int, setting: Setting, arguments: Sequence[str], output: Path
    ) -> subprocess.Popen[str]:
        hub = {
            "DISTRO_TOPOLOGY": "hub",
            "DISTRO_RELAY": f"tcp://{self.internet.addresses[self.server]}:{RELAY_PORT}",
        }
        env = {
            "RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": self.internet.addresses[self.server],
            "MASTER_PORT": str(STORE_PORT),
            # The store on the server serves all trainings, each under a name of its own.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": "campaign",
            "TORCHELASTIC_RESTART_COUNT": str(self.attempts),
            "OMP_NUM_THREADS": "1",
            "DISTRO_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",  # of one that hangs we want to know where
            "DISTRO_LOG": "info",
            "DISTRO_MODE": setting.mode,
            "DISTRO_PORTS": f"{RANK_PORT}-{RANK_PORT + 99}",
            "DISTRO_CURVE_SECRET_FILE": str(self.keys / f"rank{rank}.key"),
            "DISTRO_CURVE_PEERS_FILE": str(self.keys / "peers.txt"),
            **(hub if setting.topology == "hub" else {}),
        }
        command = [sys.executable, str(HERE / "train_gpt.py"), "--backend", "distro", *arguments]
        with output.open("w") as out:
            return self.internet.popen(rank, command, env, stdout=out, stderr=subprocess.STDOUT)


class Training:
    """The ranks of one training and the faults that hit it; a context manager.

    Args:
        world: where it runs.
        setting: how.
        steps: so many.
        seed: of the training itself; the same gives the same bits.
        timeout: of the group, in seconds; None: torch's.
    """

    def __init__(
        self, world: World, setting: Setting, steps: int, seed: int, timeout: float | None = None
    ) -> None:
        world.attempts += 1
        self.world, self.setting, self.steps = world, setting, steps
        self.folder = world.folder / f"{world.attempts:03}-{setting.topology}-{setting.mode}"
        self.folder.mkdir()
        self._journal = (self.folder / "faults.txt").open("w")
        self._began = time.monotonic()
        relay_output = self.folder / "relay.txt"
        starts_relay = (lambda: world.relay(relay_output)) if setting.topology == "hub" else None
        self.field = Field(world.internet, BASE, starts_relay)
        if self.field.hub:
            self.field.restart_relay()
        self.result = self.folder / "result.json"
        arguments = [*MODEL, "--steps", str(steps), "--seed", str(seed), "--out", str(self.result)]
        arguments += [] if timeout is None else ["--timeout-seconds", str(timeout)]
        self.field.ranks = [
            world.rank(rank, setting, arguments, self.output(rank)) for rank in range(RANKS)
        ]
        self._read = 0
        self._step = 0

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.field.ranks, self.field.relay]:
            if process is not None:
                process.kill()
                process.wait()
        self.field.go_home()
        self._journal.close()

    def output(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.txt"

    def note(self, what: str) -> None:
        """Into the list of faults, with the time and the step."""
        now = time.monotonic() - self._began
        self._journal.write(f"{now:8.2f} s  step {self._step:4}  {what}\n")
        self._journal.flush()

    def step(self) -> int:
        """How many steps rank 0 has taken, by its progress bar."""
        with self.output(0).open("rb") as output:
            output.seek(self._read)
            new = output.read()
        if found := PROGRESS.findall(new.decode(errors="replace")):
            self._step = int(found[-1])
        # The last line may come in two parts.
        self._read += max(0, len(new) - 200)
        return self._step

    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.field.ranks]

    def why(self, rank: int) -> str:
        """Last words of a rank, for people."""
        lines = self.output(rank).read_text(errors="replace").splitlines()
        said = [line for line in lines if "Error" in line] or [line for line in lines if line]
        return said[-1].strip() if said else "nothing said"

    def typed_error(self, rank: int, what: str) -> str:
        """The last of torch's errors that a rank ended with and that names `what`; empty: none."""
        errors = TYPED.findall(self.output(rank).read_text(errors="replace"))
        return str(next((error for error in reversed(errors) if what in error), ""))

    def hurt(self, plans: Sequence[Plan]) -> Outcome:
        """Let the faults come, each at its step, and wait for the end."""
        outcome = Outcome()
        running: list[Running] = []
        waiting = list(reversed(plans))
        quiet_since = time.monotonic()
        last_step = -1
        try:
            while None in (codes := self.codes()):
                now = time.monotonic()
                if any(code not in (0, None) for code in codes):
                    break
                if (step := self.step()) != last_step or running:
                    last_step, quiet_since = step, now
                while waiting and waiting[-1].step <= step:
                    plan = waiting.pop()
                    running.append(Running(plan, plan.begin(self.field), now + plan.wait))
                running = [each for each in running if each.at > now or self._go_on(each, outcome)]
                patience = HANGS_AFTER if 0 < step < self.steps else HANGS_AFTER + SLOW_START
                if now - quiet_since > patience:
                    outcome.hangs = 1
                    outcome.wrong.append(f"{self.setting}: no step for {patience:.0f} s, at {step}")
                    self._ask_for_stacks()
                    return outcome
                time.sleep(0.02)
        finally:
            for each in running:
                each.fault.close()
                self.note(f"end of {each.plan}, with the training")
            outcome.seconds = time.monotonic() - self._began
        for rank, code in enumerate(self._settled()):
            if code != 0:
                outcome.wrong.append(f"{self.setting}: rank {rank}: code {code}: {self.why(rank)}")
        if not outcome.wrong:
            outcome.result = json.loads(self.result.read_text())
        return outcome

    def _go_on(self, running: Running, outcome: Outcome) -> bool:
        """True: it has more to do, at `running.at`."""
        try:
            running.at = time.monotonic() + next(running.fault)
        except NotPossibleError:
            self.note(f"nothing to do for {running.plan}")
            return False
        except StopIteration:
            self.note(f"end of {running.plan}")
            return False
        if not running.begun:
            running.begun = True
            outcome.faults[running.plan.kind] += 1
            self.note(f"{running.plan}")
        return True

    def _settled(self) -> list[int | None]:
        """Exit codes; None: still there, and now killed."""
        end = time.monotonic() + 30
        while None in (codes := self.codes()) and time.monotonic() < end:
            time.sleep(0.05)
        return codes

    def _ask_for_stacks(self) -> None:
        """Of ranks that hang, into their outputs."""
        for process in self.field.ranks:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGABRT)
        time.sleep(1)


def fingerprint(result: dict[str, Any]) -> dict[str, Any]:
    """What of a run does not depend on what the network did."""
    return {
        "checksums": [rank["reference_checksum"] for rank in result["per_rank"]],
        "train_losses": [rank["train_loss"] for rank in result["per_rank"]],
        "val_loss": result["val_loss"],
        "val_loss_average": result["val_loss_average"],
        "losses": result["history"]["train"],
    }


def differences(result: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """How a run differs from one without faults, and its ranks from each other."""
    ours, theirs = fingerprint(result), fingerprint(expected)
    wrong = [
        f"{name} differ from a run without faults" for name in ours if ours[name] != theirs[name]
    ]
    if len(set(ours["checksums"])) != 1:
        wrong.append(f"reference checksums differ between ranks: {ours['checksums']}")
    return wrong


# How one is lost for good. kill: its process; vanish: its host, too; stop: it hangs; isolate: its
# line; relay: the hub's relay is killed, and nobody starts it again.
LOSSES = ("kill", "vanish", "stop", "isolate", "relay")


@dataclasses.dataclass(frozen=True)
class Loss:
    """Who is lost, how and when; the server stands for the relay."""

    setting: Setting
    manner: str
    victim: int
    step: int

    def __str__(self) -> str:
        who = "" if self.manner == "relay" else f" {self.name}"
        return f"{self.setting}: {self.manner}{who} at step {self.step}"

    @property
    def name(self) -> str:
        """What errors have to call it."""
        return "relay" if self.manner == "relay" else f"rank {self.victim}"

    def happen(self, field: Field, stack: contextlib.ExitStack) -> None:
        if self.manner in ("vanish", "isolate"):
            stack.enter_context(field.cut(self.victim))
        if self.manner in ("kill", "vanish", "relay"):
            field.signal(self.victim, signal.SIGKILL)
        if self.manner == "stop":
            stack.enter_context(field.stopped(self.victim))

    def must_end(self) -> dict[int, str]:
        """The ranks that have to end with a typed error, and what it has to name."""
        ends = {rank: self.name for rank in range(RANKS) if rank != self.victim}
        if self.manner == "isolate":
            ends[self.victim] = ""  # it cannot know who of all is lost
        return ends


def lose(world: World, loss: Loss, seed: int) -> Outcome:
    """A training of which one is lost for good."""
    outcome = Outcome()
    with (
        Training(world, loss.setting, 100_000, seed, TIMEOUT) as training,
        contextlib.ExitStack() as stack,
    ):
        end = time.monotonic() + SLOW_START
        while training.step() < loss.step:
            if time.monotonic() > end or any(code is not None for code in training.codes()):
                outcome.wrong.append(f"{loss}: the training has not begun")
                return outcome
            time.sleep(0.02)
        training.note(str(loss))
        loss.happen(training.field, stack)
        outcome.faults[loss.manner] += 1
        must_end = loss.must_end()
        began = time.monotonic()
        while time.monotonic() - began < TIMEOUT + SLACK + HANGS_AFTER:
            codes = training.codes()
            if all(codes[rank] is not None for rank in must_end):
                break
            time.sleep(0.02)
        outcome.seconds = time.monotonic() - began
        said = {rank: training.typed_error(rank, what) for rank, what in must_end.items()}
        outcome.said = {"what": str(loss), "seconds": round(outcome.seconds, 1), "errors": said}
        for rank, error in said.items():
            code = training.codes()[rank]
            if code is None:
                outcome.hangs += 1
                outcome.wrong.append(f"{loss}: rank {rank} hangs")
            elif code == 0 or not error:
                outcome.wrong.append(
                    f"{loss}: rank {rank}: code {code}, no typed error that names who is lost: "
                    f"{training.why(rank)}"
                )
        if outcome.seconds > TIMEOUT + SLACK:
            outcome.wrong.append(
                f"{loss}: took {outcome.seconds:.0f} s, with a time-out of {TIMEOUT:.0f} s"
            )
        if not outcome.wrong:
            shutil.rmtree(training.folder)
    return outcome


def plans(
    rng: random.Random, kinds: Sequence[str], hub: bool, number: int, steps: int, long: bool
) -> list[Plan]:
    """The faults of one training, in the order in which they begin."""
    drawn = [draw(rng, kinds, RANKS, hub, rng.randrange(2, steps - 2)) for _ in range(number)]
    if long:
        for at, (kind, seconds) in zip(rng.sample(range(number), len(LONG)), LONG, strict=True):
            drawn[at] = of_kind(rng, kind, RANKS, hub, drawn[at].step, seconds)
    return sorted(drawn, key=lambda plan: plan.step)


class Campaign:
    """All trainings of a campaign, and what came of them."""

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        self.args, self.world = args, world
        self.rng = random.Random(args.seed)
        self.began = time.monotonic()
        self.wrong: list[str] = []
        self.failures = 0
        self.said: list[dict[str, Any]] = []
        self.hangs = 0
        self.faults: Counter[str] = Counter()
        self.stats: Counter[str] = Counter()
        self.trainings = 0
        # Of a short campaign each setting has its share.
        settings = len(args.topologies) * len(args.modes)
        self.a_training = min(math.ceil(args.faults / settings), FAULTS_A_TRAINING)
        self.steps = self.a_training * STEPS_A_FAULT
        self.expected: dict[str, dict[str, Any]] = {}

    def over(self) -> bool:
        return self.failures >= ENOUGH or time.monotonic() - self.began > 60 * self.args.minutes

    def add(self, outcome: Outcome) -> None:
        self.wrong += outcome.wrong
        self.failures += bool(outcome.wrong)
        self.hangs += outcome.hangs
        self.faults += outcome.faults
        self.said += [outcome.said] if outcome.said else []
        for wrong in outcome.wrong:
            tell(f"WRONG: {wrong}")

    def undisturbed(self) -> None:
        """What has to come out, of each mode: the same over each topology."""
        for mode in self.args.modes:
            for topology in self.args.topologies:
                outcome = self.train(Setting(topology, mode), [])
                if outcome.result is None:
                    return
                self.expected.setdefault(mode, outcome.result)
                self.check(Setting(topology, mode), outcome)

    def train(self, setting: Setting, faults: Sequence[Plan]) -> Outcome:
        with Training(self.world, setting, self.steps, self.args.seed) as training:
            outcome = training.hurt(faults)
            folder = training.folder
        if outcome.result is not None and setting.mode in self.expected:
            found = differences(outcome.result, self.expected[setting.mode])
            outcome.wrong += [f"{setting}: {what}" for what in found]
        for rank in (outcome.result or {"per_rank": []})["per_rank"]:
            for name in ("resent_frames", "reconnects", "rejected_frames", "rejected_connections"):
                self.stats[name] += rank[name]
        self.add(outcome)
        self.trainings += 1
        tell(
            f"{setting}: {sum(outcome.faults.values())} faults in {outcome.seconds:.0f} s, "
            f"{sum(self.faults.values())} in all"
        )
        if not outcome.wrong and not self.args.keep:
            shutil.rmtree(folder)
        return outcome

    def check(self, setting: Setting, outcome: Outcome) -> None:
        """That an undisturbed run has the bits of the first of its mode."""
        assert outcome.result is not None
        for what in differences(outcome.result, self.expected[setting.mode]):
            self.wrong.append(f"undisturbed {setting}: {what}")

    def disturb(self) -> None:
        settings = [Setting(t, m) for m in self.args.modes for t in self.args.topologies]
        every = self.args.kinds == list(KINDS)
        long = {t for t in self.args.topologies if every and self.args.faults > FAULTS_A_TRAINING}
        number = 0
        while sum(self.faults.values()) < self.args.faults and not self.over():
            setting = settings[number % len(settings)]
            number += 1
            left = self.args.faults - sum(self.faults.values())
            share = math.ceil(left / max(1, len(settings) - number + 1))
            drawn = plans(
                self.rng,
                self.args.kinds,
                setting.topology == "hub",
                math.ceil(min(share, self.a_training) * SPARE),
                self.steps,
                setting.topology in long,
            )
            long.discard(setting.topology)
            self.train(setting, drawn)

    def kill(self) -> None:
        for number in range(self.args.kills):
            if self.over():
                break
            topology = self.args.topologies[number % len(self.args.topologies)]
            manners = LOSSES if topology == "hub" else LOSSES[:-1]
            manner = manners[number // len(self.args.topologies) % len(manners)]
            loss = Loss(
                Setting(topology, self.rng.choice(self.args.modes)),
                manner,
                RANKS if manner == "relay" else self.rng.randrange(RANKS),
                self.rng.randrange(3, 40),
            )
            tell(str(loss))
            self.add(lose(self.world, loss, self.args.seed))

    def report(self) -> dict[str, Any]:
        lost = {name: self.faults[name] for name in LOSSES}
        drawn = {name: self.faults[name] for name in KINDS}
        return {
            "seed": self.args.seed,
            "topologies": self.args.topologies,
            "modes": self.args.modes,
            "ranks": RANKS,
            "keys": True,
            "steps_a_training": self.steps,
            "trainings": self.trainings,
            "seconds": round(time.monotonic() - self.began, 1),
            "faults": sum(drawn.values()),
            "faults_by_kind": drawn,
            "lost_for_good": lost,
            "said_by_others": self.said,
            "hangs": self.hangs,
            "wrong": self.wrong,
            "counters": dict(self.stats),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=320, help="0: only those lost for good")
    parser.add_argument(
        "--kills", type=int, default=10, help="trainings of which one is lost for good"
    )
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--topologies", type=lambda text: text.split(","), default=["mesh", "hub"])
    parser.add_argument("--modes", type=lambda text: text.split(","), default=["auto", "dense"])
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument("--minutes", type=float, default=60.0, help="no training begins after that")
    parser.add_argument("--folder", type=Path, help="for the output of ranks; default: a new one")
    parser.add_argument("--keep", action="store_true", help="the output of all trainings")
    parser.add_argument("--json", action="store_true", help="nothing but the JSON")
    args = parser.parse_args()
    if lack := missing():
        print(f"the fault campaign cannot run here: {lack}", file=sys.stderr)
        sys.exit(2)
    print(f"seed {args.seed}", file=sys.stderr, flush=True)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="distro-campaign-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        world = World(folder, args.seed)
    except InternetError as error:
        print(f"the fault campaign cannot run here: {error}", file=sys.stderr)
        sys.exit(2)
    with world:
        campaign = Campaign(args, world)
        if args.faults:
            campaign.undisturbed()
            if not campaign.wrong:
                campaign.disturb()
        campaign.kill()
        report = campaign.report()
    print(json.dumps(report, indent=1))
    if report["wrong"]:
        print(f"the output of what went wrong is in {folder}", file=sys.stderr)
        sys.exit(1)
    if not args.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
