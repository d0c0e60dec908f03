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


@dataclass
class Entries:
    """What one rank sends of one tile: ascending indices within the tile, and q at each."""

    index: np.ndarray
    value: np.ndarray


Record = list[Entries]  # one per tile, in tile order
Exchange = tuple[list[Record], list[float], int, float]  # records, weights, own, gain


def cut(sizes: list[int]) -> tuple[list[list[tuple[int, int, int]]], list[list[int]]]:
    """Tiles as lists of (tensor, begin, end), and runs as lists of tile numbers.

    First every tensor of at least 4096 elements, on tiles of its own; then all smaller ones, one
    after the other, as if they were one tensor. Runs: at most 16 tiles of one big tensor, or of the
    pool.
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

    for tensor, size in enumerate(sizes):
        if size >= TILE:
            add([(tensor, size)])
    add([(tensor, size) for tensor, size in enumerate(sizes) if size < TILE])
    return tiles, runs


def to_bfloat16(value: float) -> float:
    """Round to float32, then to bfloat16, both to nearest even; never to infinity."""
    bits = int(np.float32(value).view(np.uint32))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    bits = min(bits, 0x7F7F)
    return float(np.uint32(bits << 16).view(np.float32))


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
    ) -> None:
        assert 1 <= k <= TILE
        assert value_bits in (1, 32)
        self.k, self.value_bits, self.dtype = k, value_bits, np.dtype(dtype)
        self.tiles, self.runs = cut([tensor.size for tensor in x])
        self.w = [tensor.astype(np.float32).astype(dtype).reshape(-1) for tensor in x]
        self.r = [np.zeros_like(w) for w in self.w]

    def advance(
        self, x: list[np.ndarray], due: Exchange | None, share_before: float, share_after: float
    ) -> Record:
        """Delay 1. `due`: (records, weights, own, gain) of the last exchange, or None."""
        self._absorb(x, share_before)
        if due is not None:
            self.apply(*due)
        record = self._encode()
        self._restore(x, share_after)
        return record

    def encode(self, x: list[np.ndarray], share_before: float) -> Record:
        """Delay 0, first half."""
        self._absorb(x, share_before)
        return self._encode()

    def settle(self, x: list[np.ndarray], due: Exchange, share_after: float) -> None:
        """Delay 0, second half."""
        self.apply(*due)
        self._restore(x, share_after)

    def apply(self, records: list[Record], weights: list[float], own: int, gain: float) -> None:
        """W += gain * sum of weight * q in participant order; R -= own q."""
        for number in range(len(self.tiles)):
            total = np.zeros(self._elements(number), self.dtype)
            for record, weight in zip(records, weights, strict=True):
                entries = record[number]
                total[entries.index] += self.dtype.type(weight) * entries.value
            w, r = self._gather(self.w, number), self._gather(self.r, number)
            w += self.dtype.type(gain) * total
            entries = records[own][number]
            r[entries.index] -= entries.value
            self._scatter(self.w, number, w)
            self._scatter(self.r, number, r)

    def _absorb(self, x: list[np.ndarray], share: float) -> None:
        a = self.dtype.type(share)
        for tensor, w, r in zip(x, self.w, self.r, strict=True):
            r += tensor.reshape(-1).astype(self.dtype) - (w + a * r)

    def _restore(self, x: list[np.ndarray], share: float) -> None:
        a = self.dtype.type(share)
        for tensor, w, r in zip(x, self.w, self.r, strict=True):
            tensor[...] = (w + a * r).reshape(tensor.shape)

    def _encode(self) -> Record:
        record: Record = [None] * len(self.tiles)  # type: ignore[list-item]
        for run in self.runs:
            for number in run:
                r = self._gather(self.r, number)
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

    def _elements(self, number: int) -> int:
        return sum(end - begin for _, begin, end in self.tiles[number])

    def _gather(self, flat: list[np.ndarray], number: int) -> np.ndarray:
        return np.concatenate([flat[t][begin:end] for t, begin, end in self.tiles[number]])

    def _scatter(self, flat: list[np.ndarray], number: int, values: np.ndarray) -> None:
        at = 0
        for tensor, begin, end in self.tiles[number]:
            flat[tensor][begin:end] = values[at : at + end - begin]
            at += end - begin


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
) -> list[ReferenceRank]:
    """Run n ranks over all steps of `moves` and return the ReferenceRanks.

    x: per rank the list of its tensors, equal at the beginning, changed in place.
    moves: per step and rank the list of what the optimizer adds to each tensor.
    share: gain / n where None. All ranks weigh the same. At the end an exchange may be in flight
    (delay 1).
    """
    n = len(x)
    share = gain / n if share is None else share
    weights = [1.0 / n] * n
    ranks = [ReferenceRank(tensors, k, value_bits, dtype) for tensors in x]
    in_flight: list[Record] | None = None
    for step in moves:
        for tensors, move in zip(x, step, strict=True):
            for tensor, change in zip(tensors, move, strict=True):
                tensor += change
        if delay == 0:
            records = [rank.encode(x[i], share) for i, rank in enumerate(ranks)]
            for i, rank in enumerate(ranks):
                rank.settle(x[i], (records, weights, i, gain), share)
            continue
        records = []
        for i, rank in enumerate(ranks):
            due = None if in_flight is None else (in_flight, weights, i, gain)
            records.append(rank.advance(x[i], due, share, share))
        in_flight = records
    return ranks


def _self_check() -> None:
    shapes = [(3, 4096), (768,), (), (0, 5), (70, 71), (4095,), (2, 3, 4), (70000,)]
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(shape) for shape in shapes]
    tiles, runs = cut([tensor.size for tensor in start])
    assert sum(e - b for tile in tiles for _, b, e in tile) == sum(t.size for t in start)
    assert [len(run) for run in runs] == [3, 2, 16, 2, 2]

    for delay in (0, 1):
        for k, value_bits in ((6, 1), (6, 32), (4096, 32)):
            n, gain = 3, 1.5
            x = [[tensor.copy() for tensor in start] for _ in range(n)]
            moves = [
                [[0.1 * rng.standard_normal(shape) for shape in shapes] for _ in range(n)]
                for _ in range(6)
            ]
            ranks = reference_run(x, moves, delay=delay, gain=gain, k=k, value_bits=value_bits)
            for tensors, rank in zip(x, ranks, strict=True):
                for tensor, w, r, first in zip(tensors, rank.w, rank.r, ranks[0].w, strict=True):
                    assert np.array_equal(w, first)
                    assert np.allclose(tensor.reshape(-1), w + gain / n * r)
                    if k == 4096 and delay == 0:
                        assert not r.any()
            if k == 4096 and delay == 0:
                total = sum(np.asarray(move[0]) for step in moves for move in step)
                expected = start[0].astype(np.float32) + gain / n * total
                assert np.allclose(ranks[0].w[0], expected.reshape(-1), atol=1e-6)

    assert to_bfloat16(1.00390625) == 1.0
    assert to_bfloat16(1.01171875) == 1.015625
    assert list(largest(np.array([0, -2, 2, 1, -0.0, 2]), 2)) == [1, 2]
    print("reference_step: all checks passed")


if __name__ == "__main__":
    _self_check()
