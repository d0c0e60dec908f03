"""Ranks of the codecs of devices and of host memory, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch_distro._extension import extension

RANKS = 3
GAIN = 1.7
SHARE = 0.45

# Whole and partial tiles, a pool of several tiles, 0-d, empty.
SHAPES = [(70, 130), (130,), (), (4096,), (0,), (3000,), (5000,), (17,), (3, 24000)]

devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device"),
        ),
    ],
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Ranks:
    """Ranks whose codecs exchange records in memory; each step is a random move of each rank."""

    def __init__(
        self,
        device: torch.device | None,
        dtypes: list[torch.dtype],
        k: int,
        value_bits: int,
        ranks: int = RANKS,
        turns: int = 1,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        spread: int = 0,
        share: float = SHARE,
        residual_bits: int = 32,
    ) -> None:
        self.share, self.gain = share, GAIN
        self.generator = torch.Generator().manual_seed(7)
        start = [
            torch.randn(shape, generator=self.generator).to(dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        self.x = [[tensor.to(device or "cpu", copy=True) for tensor in start] for _ in range(ranks)]
        self.make = lambda: extension().Codec(
            [tensor.numel() for tensor in start], k, value_bits, device, turns, spread,
            residual_bits,
        )  # fmt: skip
        self.codecs = [self.make() for _ in range(ranks)]
        for codec, x in zip(self.codecs, self.x, strict=True):
            assert codec.begin(x) is None
        self.in_flight: list[bytes] | None = None
        self.log: list[Any] = []
        self.number = 0  # of the exchange in flight

    def move(self, step: int) -> None:
        for x in self.x:
            for tensor in x:
                move = torch.randn(tensor.shape, generator=self.generator) * 0.01
                if step == 1:
                    move = move.sign() * 0.01  # as Adam's first step: nothing but ties
                if step == 2:
                    move[tensor.abs().cpu() > 1] = 0  # fewer entries than a tile may keep
                tensor.add_(move.to(tensor.device, tensor.dtype))

    def due(self, own: int) -> tuple[list[bytes], int, float, int] | None:
        return None if self.in_flight is None else (self.in_flight, own, self.gain, self.number)

    def step(self, step: int, delay: int) -> None:
        self.move(step)
        number = self.number + 1
        if delay == 1:
            outcomes = [
                codec.advance(x, number, self.due(rank), self.share, self.share)
                for rank, (codec, x) in enumerate(zip(self.codecs, self.x, strict=True))
            ]
        else:
            outcomes = [
                codec.encode(x, number, self.share)
                for codec, x in zip(self.codecs, self.x, strict=True)
            ]
        self.in_flight = [record for record, _ in outcomes]
        self.number = number
        if delay == 0:
            for rank, (codec, x) in enumerate(zip(self.codecs, self.x, strict=True)):
                codec.settle(x, self.due(rank), self.share)
        self.note(outcomes)

    def note(self, outcomes: list[Any]) -> None:
        checksums = {codec.checksum for codec in self.codecs}
        assert len(checksums) == 1
        weights = [tensor.to("cpu", copy=True) for x in self.x for tensor in x]
        self.log.append((checksums, [record for record, _ in outcomes], weights))


def assert_equal(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def assert_same(host: Ranks, device: Ranks) -> None:
    for step, (expected, actual) in enumerate(zip(host.log, device.log, strict=True)):
        assert expected[0] == actual[0], f"reference at step {step}"
        assert expected[1] == actual[1], f"records at step {step}"
        for left, right in zip(expected[2], actual[2], strict=True):
            assert torch.equal(left, right), f"weights at step {step}"
