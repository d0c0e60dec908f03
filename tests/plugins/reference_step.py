"""The whole `weights` step for n ranks in numpy.

Written from README.md ('How it works') and not from the C++. Tests compare the C++
codec with this through the bindings. Standalone: needs numpy only.

All arithmetic is in `dtype`: float64 is the mathematics; float32, for fp32 weights, follows the
codec's order of operations and so should give its very bits. Weights of other dtypes are not
modelled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TILE = 4096  # weights that share one selection
RUN = 16  # tiles that share one scale
STRETCH = 16  # consecutive weights that have the same turn


@dataclass
class Entries:
    """What one rank sends of one tile: ascending indices within the tile, and q at each."""

    index: np.ndarray
    value: np.ndarray


Record = list[Entries]  # one per tile, in tile order
Exchange = tuple[list[Record], list[float], int, float]  # records, weights, own, gain


def turn_elements(size: int, turns: int, turn: int) -> np.ndarray:
    """Those of a tensor's elements that are looked at in this turn, ascending."""
    elements = np.arange(size)
    return elements[elements // STRETCH % turns == turn]


def cut(
    sizes: list[int], whole: list[int] | None = None
) -> tuple[list[list[tuple[int, int, int]]], list[list[int]]]:
    """Tiles as lists of (tensor, begin, end), and runs as lists of tile numbers.

    `sizes`: what each tensor has of the turn, and begin and end count within that; which tensors
    are big is up to all that they have. First every tensor of at least 4096 elements, on tiles of
    its own; then all smaller ones, one after the other, as if they were one tensor. Runs: at most
    16 tiles of one big tensor, or of the pool.
    """
    tiles: list[list[tuple[int, int, int]]] = []
    runs: list[list[int]] = []

    def add(parts: list[tuple[int, int]]) -> None:
        """Cut what the (tensor, size) pairs hold, laid end to end, every 4096 elements."""
        first = len(tiles)
        room = 0
        for tensor, size in parts:
            begin = 0
            while begin < size:
                if room == 0:
                    tiles.append([])
                    room = TILE
                step = min(room, size - begin)
                tiles[-1].append((tensor, begin, begin + step))
                begin += step
                room -= step
        numbers = list(range(first, len(tiles)))
        runs.extend(numbers[i : i + RUN] for i in range(0, len(numbers), RUN))

    whole = sizes if whole is None else whole
    for tensor, size in enumerate(sizes):
        if whole[tensor] >= TILE:
            add([(tensor, size)])
    add([(tensor, size) for tensor, size in enumerate(sizes) if whole[tensor] < TILE])
    return tiles, runs


def to_bfloat16(value: float) -> float:
    """Round to float32, then to bfloat16, both to nearest even; never to infinity."""
    bits = int(np.float32(value).view(np.uint32))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    bits = min(bits, 0x7F7F)
    return float(np.uint32(bits << 16).view(np.float32))


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Each to the nearest bfloat16, ties to even; of float32."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(values.dtype)


def largest(r: np.ndarray, k: int) -> np.ndarray:
    """Ascending indices of the k largest |r|, ties to the lowest index, zeros never."""
    order = np.argsort(-np.abs(r), kind="stable")[:k]
    return np.sort(order[r[order] != 0])


class ReferenceRank:
    """State and step of one rank. x is a list of numpy arrays of any shape, changed in place."""

    def __init__(
        self,
        x: list[np.ndarray],
        k: int = 6,
        value_bits: int = 1,
        dtype: type[np.floating] = np.float64,
        turns: int = 1,
        spread: int = 0,
        residual_bits: int = 32,
    ) -> None:
        assert 1 <= k <= TILE
        assert value_bits in (1, 32)
        self.k, self.value_bits, self.dtype = min(turns * k, TILE), value_bits, np.dtype(dtype)
        self.turns = turns
        whole = [tensor.size for tensor in x]
        # By turn and tensor.
        self.elements = [
            [turn_elements(size, turns, turn) for size in whole] for turn in range(turns)
        ]
        self.cuts = [cut([own.size for own in of_turn], whole) for of_turn in self.elements]
        self.w = [tensor.astype(np.float32).astype(dtype).reshape(-1) for tensor in x]
        self.r = [np.zeros_like(w) for w in self.w]
        self.p = [np.zeros_like(w) for w in self.w]
        self.spread, self.residual_bits = spread, residual_bits
        self.left = False  # Before, x holds R.
        steps = np.float32(spread)
        self.keep = self.dtype.type(steps / (steps + np.float32(turns)))

    def advance(
        self,
        x: list[np.ndarray],
        number: int,
        due: Exchange | None,
        share_before: float,
        share_after: float,
    ) -> Record:
        """Delay 1, exchange `number`.

        `due`: (records, weights, own, gain) of the exchange before, or None.
        """
        turn, before = number % self.turns, (number - 1) % self.turns
        for each in {turn, before} if due is not None else {turn}:
            self._absorb(each, x, share_before)
        if due is not None:
            self.apply(number - 1, *due)
            if turn != before:
                self._restore(before, x, share_after)
        record = self._encode(turn)
        # With a share of 1 weights are W + R already where W has not changed.
        if (due is not None and turn == before) or share_before != 1 or share_after != 1:
            self._restore(turn, x, share_after)
        return record

    def encode(self, x: list[np.ndarray], number: int, share_before: float) -> Record:
        """Delay 0, first half."""
        self._absorb(number % self.turns, x, share_before)
        record = self._encode(number % self.turns)
        if self.left:
            self._keep(number % self.turns, share_before)
        return record

    def settle(self, x: list[np.ndarray], number: int, due: Exchange, share_after: float) -> None:
        """Delay 0, second half."""
        self.apply(number, *due)
        self._restore(number % self.turns, x, share_after)

    def whole_residual(self, x: list[np.ndarray], share: float) -> list[np.ndarray]:
        """R with what the optimizer has moved since each weight was looked at."""
        kept = [r.copy() for r in self.r]
        for turn in range(self.turns):
            self._absorb(turn, x, share)
        whole, self.r = self.r, kept
        return whole

    def apply(
        self, number: int, records: list[Record], weights: list[float], own: int, gain: float
    ) -> None:
        """W += gain * sum of weight * q in participant order; R -= own q.

        With a spread, P += (gain - 1) * the same sum, and of P of the turn a part comes.
        """
        turn = number % self.turns
        for tile in range(len(self.cuts[turn][0])):
            total = np.zeros(self._size(turn, tile), self.dtype)
            for record, weight in zip(records, weights, strict=True):
                entries = record[tile]
                total[entries.index] += self.dtype.type(weight) * entries.value
            w, r = self._gather(turn, self.w, tile), self._gather(turn, self.r, tile)
            w += self.dtype.type(gain) * total
            entries = records[own][tile]
            r[entries.index] -= entries.value
            self._scatter(turn, self.w, tile, w)
            self._scatter(turn, self.r, tile, r)
            if self.spread > 0:
                held = max(np.float32(gain) - np.float32(1), np.float32(0))
                p = self._gather(turn, self.p, tile)
                p = (p + self.dtype.type(held) * total) * self.keep
                self._scatter(turn, self.p, tile, p)

    def _absorb(self, turn: int, x: list[np.ndarray], share: float) -> None:
        a = self.dtype.type(share)
        for i, at in enumerate(self.elements[turn]):
            w, r = self.w[i][at] - self.p[i][at], self.r[i]
            if share == 1:
                r[at] = 0  # what x is ahead of W is R, whatever rounding did to it
            r[at] += x[i].reshape(-1)[at].astype(self.dtype) - (w + a * r[at])

    def _restore(self, turn: int, x: list[np.ndarray], share: float) -> None:
        a = self.dtype.type(share)
        self._keep(turn, share)
        self.left = True
        for i, at in enumerate(self.elements[turn]):
            w, r = self.w[i][at] - self.p[i][at], self.r[i]
            x[i].reshape(-1)[at] = w + a * r[at]

    def _keep(self, turn: int, share: float) -> None:
        """R of the turn, rounded to what it is kept in; with a share of 1 x holds it."""
        if self.residual_bits == 16 and share != 1:
            for r, at in zip(self.r, self.elements[turn], strict=True):
                r[at] = round_to_bfloat16(r[at])

    def _encode(self, turn: int) -> Record:
        tiles, runs = self.cuts[turn]
        record: Record = [None] * len(tiles)  # type: ignore[list-item]
        for run in runs:
            for number in run:
                r = self._gather(turn, self.r, number)
                kept = -(-self.k * r.size // TILE)
                index = largest(r, kept)
                record[number] = Entries(index, r[index].copy())
            if self.value_bits == 1:
                self._quantise([record[number] for number in run])
        return record

    def _quantise(self, run: list[Entries]) -> None:
        """Every value becomes its sign times the mean magnitude of the run's entries."""
        magnitudes = [abs(float(value)) for entries in run for value in entries.value]
        scale = to_bfloat16(sum(magnitudes) / len(magnitudes)) if magnitudes else 0.0
        for entries in run:
            if scale == 0.0:  # entries that would move nothing are not sent
                entries.index = entries.index[:0]
            entries.value = np.copysign(self.dtype.type(scale), entries.value)[: entries.index.size]

    def _places(self, turn: int, number: int) -> list[tuple[int, np.ndarray]]:
        """(tensor, its elements) of a tile, in the tile's order."""
        tile = self.cuts[turn][0][number]
        return [(t, self.elements[turn][t][begin:end]) for t, begin, end in tile]

    def _size(self, turn: int, number: int) -> int:
        return sum(at.size for _, at in self._places(turn, number))

    def _gather(self, turn: int, flat: list[np.ndarray], number: int) -> np.ndarray:
        return np.concatenate([flat[t][at] for t, at in self._places(turn, number)])

    def _scatter(self, turn: int, flat: list[np.ndarray], number: int, values: np.ndarray) -> None:
        begin = 0
        for tensor, at in self._places(turn, number):
            flat[tensor][at] = values[begin : begin + at.size]
            begin += at.size


def default_share(gain: float, n: int, k: int, spread: int) -> float:
    """What a rank's unsent moves count in its own weights."""
    if gain > 1:
        return 1.0 if spread > 0 else gain / n
    return max(gain / n, 0.5) if k > 64 else gain / n


def reference_run(
    x: list[list[np.ndarray]],
    moves: list[list[list[np.ndarray]]],
    *,
    delay: int = 1,
    gain: float = 1.0,
    share: float | None = None,
    k: int = 6,
    value_bits: int = 1,
    dtype: type[np.floating] = np.float64,
    turns: int = 1,
    spread: int = 0,
    residual_bits: int = 32,
) -> list[ReferenceRank]:
    """Run n ranks over all steps of `moves` and return the ReferenceRanks.

    x: per rank the list of its tensors, equal at the beginning, changed in place.
    moves: per step and rank the list of what the optimizer adds to each tensor.
    share: where None: default_share(). All ranks weigh the same. At the end an
    exchange may be in flight (delay 1).
    """
    n = len(x)
    if share is None:
        share = default_share(gain, n, k, spread)
    weights = [1.0 / n] * n
    ranks = [
        ReferenceRank(tensors, k, value_bits, dtype, turns, spread, residual_bits) for tensors in x
    ]
    in_flight: list[Record] | None = None
    for number, step in enumerate(moves, start=1):
        for tensors, move in zip(x, step, strict=True):
            for tensor, change in zip(tensors, move, strict=True):
                tensor += change
        if delay == 0:
            records = [rank.encode(x[i], number, share) for i, rank in enumerate(ranks)]
            for i, rank in enumerate(ranks):
                rank.settle(x[i], number, (records, weights, i, gain), share)
            continue
        records = []
        for i, rank in enumerate(ranks):
            due = None if in_flight is None else (in_flight, weights, i, gain)
            records.append(rank.advance(x[i], number, due, share, share))
        in_flight = records
    return ranks


def self_check() -> None:
    """What must hold of the reference alone."""
    shapes = [(3, 4096), (768,), (), (0, 5), (70, 71), (4095,), (2, 3, 4), (70000,)]
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(shape) for shape in shapes]
    tiles, runs = cut([tensor.size for tensor in start])
    assert sum(e - b for tile in tiles for _, b, e in tile) == sum(t.size for t in start)
    assert [len(run) for run in runs] == [3, 2, 16, 2, 2]

    for delay, turns in ((0, 1), (1, 1), (0, 4), (1, 4)):
        for k, value_bits in ((6, 1), (6, 32), (4096, 32)):
            n, gain = 3, 1.5
            x = [[tensor.copy() for tensor in start] for _ in range(n)]
            moves = [
                [[0.1 * rng.standard_normal(shape) for shape in shapes] for _ in range(n)]
                for _ in range(6)
            ]
            ranks = reference_run(
                x, moves, delay=delay, gain=gain, k=k, value_bits=value_bits, turns=turns
            )
            share = gain / n
            for tensors, rank in zip(x, ranks, strict=True):
                whole = rank.whole_residual(tensors, share)
                for tensor, w, r, all_of_r, first in zip(
                    tensors, rank.w, rank.r, whole, ranks[0].w, strict=True
                ):
                    assert np.array_equal(w, first)
                    # What has not had its turn since counts in full.
                    assert np.allclose(tensor.reshape(-1), w + share * r + (all_of_r - r))
                    if k == 4096 and delay == 0 and turns == 1:
                        assert not all_of_r.any()
            if k == 4096 and delay == 0 and turns == 1:
                total = sum(np.asarray(move[0]) for step in moves for move in step)
                expected = start[0].astype(np.float32) + gain / n * total
                assert np.allclose(ranks[0].w[0], expected.reshape(-1), atol=1e-6)

    assert to_bfloat16(1.00390625) == 1.0
    assert to_bfloat16(1.01171875) == 1.015625
    assert list(round_to_bfloat16(np.array([1.00390625, -1.01171875]))) == [1.0, -1.015625]
    assert list(largest(np.array([0, -2, 2, 1, -0.0, 2]), 2)) == [1, 2]
    print("reference_step: all checks passed")


if __name__ == "__main__":
    self_check()
