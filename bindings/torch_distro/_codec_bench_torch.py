"""The codec's operations in PyTorch's own functions, for ``torch-distro bench codec``."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

ELEMENTS = 6553600
"""Of DDP's default bucket: 25 MiB of fp32."""
SIDE = 2560
TILE = 4096
BLOCK = 64
K = 6
PEERS = 8
# How often a row is repeated.
FEWEST, MOST = 3, 50


def rows(seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each operation and number of threads; `seconds`: of measuring, at least."""
    torch.manual_seed(1)
    before = torch.get_num_threads()
    source, target = torch.randn(ELEMENTS), torch.empty(ELEMENTS)
    try:
        with torch.no_grad():
            for threads in range(1, min(2, len(os.sched_getaffinity(0))) + 1):
                torch.set_num_threads(threads)
                for name, work in _works():
                    times: list[float] = []
                    copies: list[float] = []
                    end = time.perf_counter() + seconds
                    while len(times) < MOST:
                        copies.append(_seconds(lambda: target.copy_(source)))
                        times.append(_seconds(work))
                        if len(times) >= FEWEST and time.perf_counter() > end:
                            break
                    took, copy = statistics.median(times), statistics.median(copies)
                    yield {
                        "row": f"{name}/threads:{threads}",
                        "milliseconds": 1e3 * took,
                        "copy_milliseconds": 1e3 * copy,
                        "ratio": took / copy,
                    }
    finally:
        torch.set_num_threads(before)


def _works() -> Iterator[tuple[str, Callable[[], object]]]:
    """The operations in PyTorch, by the names of the codec's rows."""
    weights = _Weights()
    yield "weights_sync_one_span", weights.sync
    yield f"weights_apply_{PEERS}_peers", weights.apply
    gradients = _Gradients()
    yield "ef_encode", gradients.encode
    for peers in (1, PEERS):
        yield f"ef_decode_{peers}_peers", partial(gradients.decode, peers)


class _Weights:
    """The weights mode in one span: R += what the optimizer did, the largest of each tile as a sign
    and a scale, W and R without them, x = W + share R."""

    share = 0.5

    def __init__(self) -> None:
        self.x = torch.randn(ELEMENTS)
        self.w, self.left = self.x.clone(), torch.empty_like(self.x)
        self.r = torch.randn(ELEMENTS) * 1e-2
        self.sent = [self.select() for _ in range(PEERS)]

    def select(self) -> tuple[Tensor, Tensor]:
        tiles = self.r.view(-1, TILE)
        index = tiles.abs().topk(K, dim=1, sorted=False).indices
        values = tiles.gather(1, index)
        scale = values.abs().mean(1, keepdim=True)
        return index, values.sign() * scale

    def sync(self) -> None:
        torch.add(self.w, self.r, alpha=self.share, out=self.left)
        self.r += torch.sub(self.x, self.left, out=self.left)
        index, values = self.sent[0]
        self.w.view(-1, TILE).scatter_add_(1, index, values)
        self.r.view(-1, TILE).scatter_add_(1, index, -values)
        self.sent[0] = self.select()
        torch.add(self.w, self.r, alpha=self.share, out=self.x)

    def apply(self) -> None:
        tiles = self.w.view(-1, TILE)
        for index, values in self.sent:
            tiles.scatter_add_(1, index, values / PEERS)


class _Gradients:
    """Error feedback over blocks of 64 x 64 in the transform domain, as DeMo's operations are."""

    def __init__(self) -> None:
        place = torch.arange(BLOCK)
        self.basis = torch.cos(torch.pi / BLOCK * (place + 0.5) * place[:, None])
        self.basis *= (2 / BLOCK) ** 0.5
        self.basis[0] /= 2**0.5
        self.gradient = torch.randn(SIDE, SIDE)
        self.m = torch.zeros(ELEMENTS // TILE, TILE)
        self.sent = [self.encode() for _ in range(PEERS)]

    def blocks(self) -> Tensor:
        """[rows of blocks, columns of blocks, 64, 64]: a view of the gradient."""
        return self.gradient.view(SIDE // BLOCK, BLOCK, SIDE // BLOCK, BLOCK).transpose(1, 2)

    def encode(self) -> tuple[Tensor, Tensor]:
        basis = self.basis
        self.m += torch.einsum("ui,abij,vj->abuv", basis, self.blocks(), basis).reshape(-1, TILE)
        index = self.m.abs().topk(K, dim=1, sorted=False).indices
        values = self.m.gather(1, index)
        values = values.sign() * values.abs().mean(1, keepdim=True)
        self.m.scatter_add_(1, index, -values)
        return index, values

    def decode(self, peers: int) -> None:
        total = torch.zeros(ELEMENTS // TILE, TILE)
        for index, values in self.sent[:peers]:
            total.scatter_add_(1, index, values / peers)
        total = total.view(SIDE // BLOCK, SIDE // BLOCK, BLOCK, BLOCK)
        self.blocks().copy_(torch.einsum("ui,abuv,vj->abij", self.basis, total, self.basis))


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
