"""The codec of devices against that of host memory: any calls in a row make the same bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from codec_ranks import FLOATS, GAIN, SHAPES, SHARE, Ranks, devices


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().flatten().view(torch.uint8).numpy().tobytes()


class AnyCalls(Ranks):
    """Two ranks, whose codecs are called in a random order; what a seed does is always the same."""

    def __init__(self, device: torch.device | None, seed: int) -> None:
        self.random = random.Random(seed)
        one_of = self.random.choice
        super().__init__(
            device,
            one_of([[torch.float32] * len(SHAPES), [one_of(FLOATS) for _ in SHAPES]]),
            one_of([1, 6, 64, 4096]),
            one_of([1, 32]),
            ranks=2,
            turns=one_of([1, 1, 2, 5]),
            spread=one_of([0, 7]),
            share=one_of([SHARE, 1.0]),
            residual_bits=one_of([16, 32]),
        )

    def call(self) -> tuple[str, set[int], list[bytes], list[bytes]]:
        """Its name, and all that it made, by bit."""
        self.gain = self.random.choice([1.0, GAIN])
        self.move(self.random.randrange(1, 9))
        call = self.random.choice(
            [self.advance] * 6 + [self.encode_and_settle] * 4
            + [self.apply, self.leave, self.reshare, self.resume, self.restart]
        )  # fmt: skip
        records = [record for record, _ in call()]
        checksums = {codec.checksum for codec in self.codecs}
        assert len(checksums) == 1
        tensors = [tensor for x in self.x for tensor in x]
        tensors += [part for state in self.states() for parts in state for part in parts]
        return call.__name__, checksums, records, [_bits(tensor) for tensor in tensors]

    def each(self) -> Iterator[tuple[int, Any, list[torch.Tensor]]]:
        for rank, (codec, x) in enumerate(zip(self.codecs, self.x, strict=True)):
            yield rank, codec, x

    def another_share(self) -> float:
        return self.random.choice([self.share, self.share, SHARE, 1.0])

    def advance(self) -> list[Any]:
        after, number = self.another_share(), self.number + 1
        outcomes = []
        for rank, codec, x in self.each():
            if rank == 1 and self.random.random() < 0.3:
                _, moved = codec.follow(x, number, self.due(rank), self.share, after)
                outcomes.append((codec.empty_record(number), moved))
            else:
                outcomes.append(codec.advance(x, number, self.due(rank), self.share, after))
        self.share, self.number = after, number
        self.in_flight = [record for record, _ in outcomes]
        return outcomes

    def encode_and_settle(self) -> list[Any]:
        self.apply()
        after, self.number = self.another_share(), self.number + 1
        outcomes = [codec.encode(x, self.number, self.share) for _, codec, x in self.each()]
        self.in_flight = [record for record, _ in outcomes]
        for rank, codec, x in self.each():
            codec.settle(x, self.due(rank), after)
        self.share, self.in_flight = after, None
        return outcomes

    def apply(self) -> list[Any]:
        for rank, codec, _ in self.each():
            if (due := self.due(rank)) is not None:
                codec.apply(due)
        self.in_flight = None
        return []

    def leave(self) -> list[Any]:
        self.share = self.random.choice([0.0, SHARE, 1.0])
        for _, codec, x in self.each():
            codec.leave(x, self.share)
        return []

    def reshare(self) -> list[Any]:
        after = self.another_share()
        for _, codec, x in self.each():
            codec.reshare(x, self.share, after)
        self.share = after
        return []

    def states(self) -> list[list[tuple[torch.Tensor, ...]]]:
        return [codec.state(x, self.share) for _, codec, x in self.each()]

    def resume(self) -> list[Any]:
        for (_, codec, _), state in zip(self.each(), self.states(), strict=True):
            codec.restore_state(state)
        return []

    def restart(self) -> list[Any]:
        """As after a mean of the ranks."""
        self.number, self.in_flight = 0, None
        for _, codec, x in self.each():
            for mine, first in zip(x, self.x[0], strict=True):
                mine.copy_(first)
            assert codec.begin(x) is None
        self.share = 0.0
        return []


@pytest.mark.parametrize("seed", range(40))
@devices
def test_calls_in_any_order_do_what_they_do_with_the_host_codec(seed: int, device: str) -> None:
    host, other = (AnyCalls(on, seed) for on in (None, torch.device(device)))
    calls = []
    for _ in range(25):
        expected, found = host.call(), other.call()
        calls.append(expected[0])
        assert [a == b for a, b in zip(expected, found, strict=True)] == [True] * 4, calls
    bad = (5, 6, 8)[seed % 3]  # has weights in every turn
    for ranks in (host, other):
        ranks.x[1][bad].fill_(float("nan"))
    outcomes = [
        ranks.codecs[1].advance(ranks.x[1], ranks.number + 1, None, 1.0, 1.0)
        for ranks in (host, other)
    ]
    assert outcomes == [bad] * 2
