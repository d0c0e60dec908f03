"""A random program of collectives: distro must give what gloo gives, bit for bit.

Usage: random_program.py [--seeds 10] [--first-seed N] [--ranks 2 3 4] [--steps 500]

Every rank draws the same program from the seed: kinds of collectives, groups, dtypes, sizes,
operators, how many are in flight. Each step runs in a gloo group and in a distro group of the same
processes, on equal inputs that differ by rank.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

sys.path.insert(0, str(Path(__file__).parent.parent / "bindings"))

from ranks import MINOR, OPTIONS, run

DTYPES = [
    torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64,
    torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool,
    torch.int16,  # gloo refuses it
]  # fmt: skip
OPERATORS = [
    ReduceOp.SUM, ReduceOp.SUM, ReduceOp.AVG, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX,
    ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR,
]  # fmt: skip
LARGE_ELEMENTS = 1_000_000


@dataclass
class Groups:
    """The same ranks as a gloo and as a distro group."""

    ranks: list[int]
    gloo: dist.ProcessGroup
    distro: dist.ProcessGroup


@dataclass
class Step:
    """One collective in one of two groups; `draw` and `values` begin alike in both."""

    group: dist.ProcessGroup
    gloo: bool
    ranks: list[int]
    draw: random.Random  # the same on all ranks
    values: torch.Generator  # another on each rank
    dtype: torch.dtype
    operator: Any

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def elements(self) -> int:
        """A number of elements: often few, sometimes none, seldom many."""
        return self.draw.choice([0, 1, 3, 64, 1000, 4097, 4097, self.draw.randrange(100_000)])

    def tensor(self, elements: int | None = None) -> torch.Tensor:
        """This rank's values, in one or two dimensions."""
        count = self.elements() if elements is None else elements
        if self.dtype.is_floating_point or self.dtype.is_complex:
            kind = torch.complex64 if self.dtype.is_complex else torch.float32
            flat = torch.randn(count, generator=self.values, dtype=kind).mul_(3).to(self.dtype)
        else:
            flat = torch.randint(0, 100, (count,), generator=self.values).to(self.dtype)
        return flat.reshape(2, -1) if count and count % 2 == 0 else flat

    def tensors(self, count: int, elements: int | None = None) -> list[torch.Tensor]:
        size = self.elements() if elements is None else elements
        return [self.tensor(size) for _ in range(count)]

    def empty(self, elements: int) -> torch.Tensor:
        return torch.zeros(elements, dtype=self.dtype)

    def root(self) -> int:
        return self.draw.choice(self.ranks)

    @property
    def reduction(self) -> Any:  # noqa: ANN401 - a ReduceOp
        """The operator; gloo sums where distro averages, and `averaged` divides."""
        return ReduceOp.SUM if self.gloo and self.operator == ReduceOp.AVG else self.operator

    def averaged(self, outputs: list[torch.Tensor]) -> None:
        if self.gloo and self.operator == ReduceOp.AVG:
            for output in outputs:
                integral = not (output.dtype.is_floating_point or output.dtype.is_complex)
                parts = torch.view_as_real(output) if output.dtype.is_complex else output
                parts.div_(self.size, rounding_mode="trunc" if integral else None)


# What a collective gives: outputs, what to wait for, and a last act on the outputs.
Started = tuple[list[torch.Tensor], list[Any], Callable[[], None]]


def _nothing() -> None: ...


def all_reduce(step: Step) -> Started:
    x = step.tensor(LARGE_ELEMENTS if step.draw.random() < 0.1 else None)
    if step.draw.random() < 0.2 and x.dim() == 2:
        x = x.t()  # dense, not contiguous
    work = dist.all_reduce(x, step.reduction, group=step.group, async_op=True)
    return [x], [work], lambda: step.averaged([x])


def all_reduce_coalesced(step: Step) -> Started:
    xs = step.tensors(step.draw.randint(1, 3))
    work = dist.all_reduce_coalesced(xs, step.reduction, group=step.group, async_op=True)
    return xs, [work], lambda: step.averaged(xs)


def all_reduce_in_a_coalescing_block(step: Step) -> Started:
    xs = step.tensors(3)
    with dist._coalescing_manager(group=step.group, async_ops=True) as block:
        for x in xs:
            dist.all_reduce(x, step.reduction, group=step.group)
    return xs, [block], lambda: step.averaged(xs)


def broadcast(step: Step) -> Started:
    x = step.tensor(LARGE_ELEMENTS if step.draw.random() < 0.1 else None)
    return [x], [dist.broadcast(x, step.root(), group=step.group, async_op=True)], _nothing


def reduce(step: Step) -> Started:
    x, root = step.tensor(), step.root()
    work = dist.reduce(x, root, step.reduction, group=step.group, async_op=True)
    kept = [x] if dist.get_rank() == root else []  # the others' are undefined
    return kept, [work], lambda: step.averaged(kept)


def all_gather(step: Step) -> Started:
    x = step.tensor()
    outputs = [torch.zeros_like(x) for _ in step.ranks]
    return outputs, [dist.all_gather(outputs, x, group=step.group, async_op=True)], _nothing


def all_gather_into_tensor(step: Step) -> Started:
    x = step.tensor()
    output = step.empty(x.numel() * step.size)
    work = dist.all_gather_into_tensor(output, x.reshape(-1), group=step.group, async_op=True)
    return [output], [work], _nothing


def all_gather_into_tensors(step: Step) -> Started:
    xs = [x.reshape(-1) for x in step.tensors(2)]
    outputs = [step.empty(x.numel() * step.size) for x in xs]
    with dist._coalescing_manager(group=step.group, async_ops=True) as block:
        for x, output in zip(xs, outputs, strict=True):
            dist.all_gather_into_tensor(output, x, group=step.group)
    return outputs, [block], _nothing


def all_gather_coalesced(step: Step) -> Started:
    xs = step.tensors(2)
    outputs = [[torch.zeros_like(x) for x in xs] for _ in step.ranks]
    work = dist.all_gather_coalesced(outputs, xs, group=step.group, async_op=True)
    return [x for row in outputs for x in row], [work], _nothing


def gather(step: Step) -> Started:
    x, root = step.tensor(), step.root()
    outputs = [torch.zeros_like(x) for _ in step.ranks] if dist.get_rank() == root else None
    work = dist.gather(x, outputs, root, group=step.group, async_op=True)
    return outputs or [], [work], _nothing


def scatter(step: Step) -> Started:
    root, elements = step.root(), step.elements()
    output = step.empty(elements)
    inputs = [x.reshape(-1) for x in step.tensors(step.size, elements)]
    given = inputs if dist.get_rank() == root else None
    return [output], [dist.scatter(output, given, root, group=step.group, async_op=True)], _nothing


def reduce_scatter(step: Step) -> Started:
    elements = step.elements()
    output = step.empty(elements)
    inputs = [x.reshape(-1) for x in step.tensors(step.size, elements)]
    work = dist.reduce_scatter(output, inputs, step.reduction, group=step.group, async_op=True)
    return [output], [work], lambda: step.averaged([output])


def reduce_scatter_tensor(step: Step) -> Started:
    elements = step.elements()
    output = step.empty(elements)
    x = step.tensor(elements * step.size).reshape(-1)
    work = dist.reduce_scatter_tensor(output, x, step.reduction, group=step.group, async_op=True)
    return [output], [work], lambda: step.averaged([output])


def reduce_scatter_tensors(step: Step) -> Started:
    elements = [step.elements() for _ in range(2)]
    outputs = [step.empty(count) for count in elements]
    with dist._coalescing_manager(group=step.group, async_ops=True) as block:
        for output, count in zip(outputs, elements, strict=True):
            x = step.tensor(count * step.size).reshape(-1)
            dist.reduce_scatter_tensor(output, x, step.reduction, group=step.group)
    return outputs, [block], lambda: step.averaged(outputs)


def all_to_all_single(step: Step) -> Started:
    splits = [[step.draw.randrange(200) for _ in step.ranks] for _ in step.ranks]  # from, to
    mine, incoming = splits[step.rank], [row[step.rank] for row in splits]
    x, output = step.tensor(sum(mine)).reshape(-1), step.empty(sum(incoming))
    work = dist.all_to_all_single(output, x, incoming, mine, group=step.group, async_op=True)
    return [output], [work], _nothing


def all_to_all_single_evenly(step: Step) -> Started:
    x = step.tensor(step.elements() * step.size).reshape(-1)
    output = step.empty(x.numel())
    work = dist.all_to_all_single(output, x, group=step.group, async_op=True)
    return [output], [work], _nothing


def all_to_all(step: Step) -> Started:
    xs = step.tensors(step.size)
    outputs = [torch.zeros_like(x) for x in xs]
    return outputs, [dist.all_to_all(outputs, xs, group=step.group, async_op=True)], _nothing


def ring(step: Step) -> Started:
    x = step.tensor()
    output = torch.zeros_like(x)
    right = step.ranks[(step.rank + 1) % step.size]
    left = step.ranks[(step.rank - 1) % step.size]
    batch = [
        dist.P2POp(dist.isend, x, right, group=step.group),
        dist.P2POp(dist.irecv, output, left, group=step.group),
    ]
    return [output], list(dist.batch_isend_irecv(batch)), _nothing


def tagged_pair(step: Step) -> Started:
    source, target = step.draw.sample(step.ranks, 2)
    elements, tag = step.elements(), step.draw.randrange(100)
    if dist.get_rank() == source:
        x = step.tensor(elements).reshape(-1)
        return [], [dist.isend(x, target, group=step.group, tag=tag)], _nothing
    output = step.empty(elements)
    if dist.get_rank() != target:
        return [], [], _nothing
    return [output], [dist.irecv(output, source, group=step.group, tag=tag)], _nothing


def barrier(step: Step) -> Started:
    return [], [dist.barrier(group=step.group, async_op=True)], _nothing


# Of these gloo's sum gives no average to compare with: it overflows, or is divided by other steps.
NOT_AVERAGED = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.complex64,
    torch.complex128,
)  # fmt: skip

COLLECTIVES: list[Callable[[Step], Started]] = [
    all_reduce, all_reduce, all_reduce_coalesced, all_reduce_in_a_coalescing_block, broadcast,
    reduce, all_gather, all_gather_into_tensor, all_gather_into_tensors, all_gather_coalesced,
    gather, scatter, reduce_scatter, reduce_scatter_tensor, reduce_scatter_tensors,
    all_to_all_single, all_to_all_single_evenly, ring, tagged_pair, barrier,
]  # fmt: skip
if MINOR >= (2, 15):  # in older ones gloo has none to compare with
    COLLECTIVES.append(all_to_all)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    alike = left.dtype == right.dtype and left.shape == right.shape
    if OPTIONS and alike:
        # Over its own transport distro adds up in the order of the ranks, 16 bits in 32, and a sum
        # of bool is 0 or 1: gloo rounds otherwise, and leaves other bytes.
        loose = left.dtype in (torch.float16, torch.bfloat16)
        fraction = left.dtype.is_floating_point or left.dtype.is_complex
        tolerance = (0.02 if loose else 1e-4) if fraction else 0.0
        return torch.allclose(left, right, rtol=tolerance, atol=10 * tolerance, equal_nan=True)
    return alike and torch.equal(_bytes(left), _bytes(right))


def make_groups(draw: random.Random, size: int) -> list[Groups]:
    """The world, and some of its subsets."""
    subsets = [list(range(size))] * 2
    for _ in range(3 if size > 2 else 1):
        subsets.append(sorted(draw.sample(range(size), draw.randint(2, size))))
    return [
        Groups(
            ranks,
            dist.new_group(ranks, backend="gloo"),  # type: ignore[arg-type]
            dist.group.WORLD if not i else dist.new_group(ranks, backend="distro"),  # type: ignore[arg-type]
        )
        for i, ranks in enumerate(subsets)
    ]


class Run:
    """A collective under way, or over, in one group."""

    def __init__(self, collective: Callable[[Step], Started], step: Step) -> None:
        self.outputs: list[torch.Tensor] = []
        self.refusal = ""
        self._works: list[Any] = []
        self._finish = _nothing
        try:
            self.outputs, self._works, self._finish = collective(step)
        except (RuntimeError, ValueError, TypeError) as error:
            self._refuse(error)

    def wait(self) -> None:
        try:
            for work in self._works:
                if work is not None:
                    work.wait()
            if not self.refusal:
                self._finish()
        except (RuntimeError, ValueError, TypeError) as error:
            self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        self.refusal = f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _compare(what: str, expected: Run, actual: Run) -> None:
    """What gloo refuses (a dtype, an operator), distro refuses in the same words.

    Over its own transport (TEST_EXACT) it may do more, and has words of its own.
    """
    words_differ = bool(OPTIONS) and expected.refusal
    assert words_differ or expected.refusal == actual.refusal, (
        f"{what}: gloo says '{expected.refusal}', distro '{actual.refusal}'"
    )
    if not expected.refusal:
        for left, right in zip(expected.outputs, actual.outputs, strict=True):
            assert _same(left, right), (
                f"{what} of {left.numel()} elements: gloo {left.reshape(-1)[:8]}, "
                f"distro {right.reshape(-1)[:8]}, {int((left != right).sum())} differ"
            )


def program(rank: int, size: int, seed: int, steps: int) -> dict[str, int]:
    """Run the program of a seed; how often each collective ran. Raises at the first difference."""
    draw = random.Random(seed)
    groups = make_groups(draw, size)
    ran: Counter[str] = Counter()
    done = 0

    def finish(in_flight: list[tuple[str, Callable[[Step], Started], list[Run]]]) -> None:
        for what, collective, both in in_flight:
            for run_ in both:
                run_.wait()
            _compare(what, *both)
            ran["refused" if both[0].refusal else collective.__name__] += 1
        in_flight.clear()

    while done < steps:
        in_flight: list[tuple[str, Callable[[Step], Started], list[Run]]] = []
        for number in range(done, min(steps, done + draw.randint(1, 4))):
            done = number + 1
            at, collective = draw.choice(groups), draw.choice(COLLECTIVES)
            dtype, operator = draw.choice(DTYPES), draw.choice(OPERATORS)
            if rank not in at.ranks:
                continue
            if dtype in NOT_AVERAGED and operator == ReduceOp.AVG:
                operator = ReduceOp.SUM
            if collective is barrier:
                # Gloo's barrier fails with what was refused before it, until its thread has
                # forgotten that, a moment after the wait for it.
                finish(in_flight)
                time.sleep(0.05)
            key = f"{seed}/{number}"
            own_seed = random.Random(f"{key}/{rank}").getrandbits(60)
            both = [
                Run(
                    collective,
                    Step(
                        group=group,
                        gloo=group is at.gloo,
                        ranks=at.ranks,
                        draw=random.Random(key),
                        values=torch.Generator().manual_seed(own_seed),
                        dtype=dtype,
                        operator=operator,
                    ),
                )
                for group in (at.gloo, at.distro)
            ]
            what = f"seed {seed}, step {number}: {collective.__name__} of {dtype}, {operator}"
            in_flight.append((what, collective, both))
        # Each rank waits in an order of its own.
        random.Random(f"{seed}/{done}/{rank}").shuffle(in_flight)
        finish(in_flight)
    return dict(ran)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10, help="how many programs")
    parser.add_argument("--first-seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for ranks in options.ranks:
            began = time.monotonic()
            ran = run(ranks, program, seed, options.steps)
            seconds = math.ceil(time.monotonic() - began)
            print(
                f"seed {seed}, {ranks} ranks: {options.steps} collectives equal gloo's bit for bit "
                f"({ran[0].pop('refused', 0)} refused alike, {len(ran[0])} kinds), {seconds} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
