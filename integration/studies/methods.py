"""What participants exchange: distro's weights mode by its own codec, and what it is judged beside.

A method sees the weights of all participants between the optimizer's step and the next forward, as
a script's ranks meet in it, or their gradients before the optimizer's step, and changes them in
place. It counts the bits of what a participant sends.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch_distro import _extension

TILE = 4096


class Method:
    """An exchange between n participants.

    Attributes:
        bits: what one participant has sent so far.
        signs: gradients become signs, for an optimizer that only takes lr times them.
    """

    signs = False

    def __init__(self) -> None:
        self.bits = 0.0

    def sync(self, weights: Sequence[Tensor]) -> None:
        """Exchange; `weights` are [n, ...], one a tensor of the model."""

    def reduce(self, gradients: Sequence[Tensor]) -> bool:
        """Exchange gradients, [n, ...] each. Whether the optimizer steps now."""
        return True

    def reference(self, weights: Sequence[Tensor]) -> list[Tensor] | None:
        """W, [elements] each; None where there is no such thing."""
        return None


class Alone(Method):
    """Nothing is exchanged: the line that every exchange has to beat."""


class Weights(Method):
    """The weights mode, by the codec of the installed backend.

    Args:
        k: DISTRO_K.
        value_bits: Options.value_bits.
        delay: DISTRO_DELAY.
        gain: DISTRO_GAIN; default: sqrt n.
        turns: Options.turns; default: the backend's own.
        share: Options.share; default: the backend's own.
        spread: Options.spread; default: the backend's own.
        residual_bits: Options.residual_bits.
        residual_dtype, reference_dtype: what R and W are rounded to after each exchange, as if they
            were kept so ("bfloat16", "float16"; "float64" is float32 by the same way); the codec
            keeps float32. For shares below 1.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        k: int = 10,
        value_bits: int = 1,
        delay: int = 1,
        gain: float | None = None,
        share: float | None = None,
        turns: int | None = None,
        spread: int | None = None,
        residual_bits: int = 32,
        residual_dtype: str = "float32",
        reference_dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.n, self.delay = len(weights[0]), delay
        self.residual_dtype = getattr(torch, residual_dtype)
        self.reference_dtype = getattr(torch, reference_dtype)
        core = _extension.extension()
        turns = core.default_turns(k) if turns is None else turns
        self.gain = math.sqrt(self.n) if gain is None else gain
        spread = core.default_spread_steps(k, delay) if spread is None else spread
        self.share = core.default_share(self.gain, self.n, k, spread) if share is None else share
        elements = [tensor[0].numel() for tensor in weights]
        # In host memory the codec that is faster there; on a device the one that works on it.
        device = None if weights[0].is_cpu else weights[0].device
        self.codecs = [
            core.Codec(elements, k, value_bits, device, turns, spread, residual_bits)
            for _ in range(self.n)
        ]
        self.begun = False
        self.number = 0
        self.in_flight: list[bytes] | None = None

    def sync(self, weights: Sequence[Tensor]) -> None:
        own = [[tensor[i] for tensor in weights] for i in range(self.n)]
        if not self.begun:
            for codec, x in zip(self.codecs, own, strict=True):
                codec.begin(x)
            self.begun = True
            return
        self.number += 1
        due, records = self.in_flight, []
        for i, (codec, x) in enumerate(zip(self.codecs, own, strict=True)):
            if self.delay == 1:
                arrived = None if due is None else (due, i, self.gain, self.number - 1)
                made = codec.advance(x, self.number, arrived, self.share, self.share)
            else:
                made = codec.encode(x, self.number, self.share)
            if isinstance(made, int):
                raise FloatingPointError(f"a weight of tensor {made} is not finite")
            records.append(made[0])
        if self.delay == 1:
            self.in_flight = records
        else:
            for i, (codec, x) in enumerate(zip(self.codecs, own, strict=True)):
                codec.settle(x, (records, i, self.gain, self.number), self.share)
        self.bits += 8 * sum(map(len, records)) / self.n
        if self.residual_dtype != torch.float32 or self.reference_dtype != torch.float32:
            for i, x in enumerate(own):
                self._round(i, x)

    def _round(self, i: int, x: Sequence[Tensor]) -> None:
        """W and R of participant i become what their types can hold, and x what follows from them.

        x is W + share * R and what the optimizer has moved since its turn; R of the state has all
        of that move.
        """
        codec, rounded = self.codecs[i], []
        for tensor, (w, r, pending) in zip(x, codec.state(x, self.share), strict=True):
            arrived = w - pending if len(pending) else w
            kept = (r - (tensor.flatten() - arrived)) / (1 - self.share)
            moved = r - kept
            w = w.to(self.reference_dtype).float()
            kept = kept.to(self.residual_dtype).float()
            arrived = w - pending if len(pending) else w
            tensor.copy_((arrived + self.share * kept + moved).view_as(tensor))
            rounded.append((w, kept, pending))
        codec.restore_state(rounded)

    def reference(self, weights: Sequence[Tensor]) -> list[Tensor] | None:
        state = self.codecs[0].state([tensor[0] for tensor in weights], self.share)
        return [w - pending if len(pending) else w for w, _, pending in state]


def _top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of [n, elements], per tile the k largest by magnitude: (a mask, the tiles), padded."""
    n, elements = values.shape
    tiles = functional.pad(values, (0, -elements % TILE)).view(n, -1, TILE)
    index = tiles.abs().topk(k, dim=2, sorted=False).indices
    return torch.zeros_like(tiles, dtype=torch.bool).scatter_(2, index, True), tiles


class _Flat(Method, ABC):
    """Methods that see all weights as one [n, elements]; W is [elements]."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.sizes = [tensor[0].numel() for tensor in weights]
        self.n, self.elements = len(weights[0]), sum(self.sizes)
        self.w: Tensor | None = None
        self.steps = 0

    def sync(self, weights: Sequence[Tensor]) -> None:
        x = torch.cat([tensor.view(self.n, -1) for tensor in weights], dim=1)
        if self.w is None:
            self.w = x[0].clone()
            return
        self.steps += 1
        if self.exchange(x, self.w):
            for tensor, new in zip(weights, x.split(self.sizes, dim=1), strict=True):
                tensor.copy_(new.view(tensor.shape))

    @abstractmethod
    def exchange(self, x: Tensor, w: Tensor) -> bool:
        """Change x and w in place; whether x has changed."""

    def reference(self, weights: Sequence[Tensor]) -> list[Tensor] | None:
        return None if self.w is None else list(self.w.split(self.sizes))


class DiLoCo(_Flat):
    """Every `every` steps the mean move, by Nesterov's momentum (arXiv 2311.08105).

    Args:
        every: steps between exchanges.
        outer_lr, momentum: of the outer optimizer.
        bits_each: of a sent weight; below 32 it is rounded to as many levels of its tile.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        every: int = 500,
        outer_lr: float = 0.7,
        momentum: float = 0.9,
        bits_each: int = 32,
    ) -> None:
        super().__init__(weights)
        self.every, self.outer_lr, self.momentum, self.bits_each = (
            every, outer_lr, momentum, bits_each,
        )  # fmt: skip
        self.velocity = torch.zeros(self.elements, device=weights[0].device)

    def exchange(self, x: Tensor, w: Tensor) -> bool:
        if self.steps % self.every:
            return False
        moves = x - w
        if self.bits_each < 32:
            tiles = functional.pad(moves, (0, -self.elements % TILE)).view(self.n, -1, TILE)
            step = tiles.abs().amax(2, keepdim=True) / (2 ** (self.bits_each - 1) - 0.5)
            tiles = ((tiles / step - 0.5).round() + 0.5) * step
            moves = tiles.nan_to_num().view(self.n, -1)[:, : self.elements]
        mean = moves.mean(0)
        self.velocity = self.momentum * self.velocity + mean
        w += self.outer_lr * (mean + self.momentum * self.velocity)
        x.copy_(w.expand_as(x))
        self.bits += self.elements * self.bits_each
        return True


class SparseLoCo(_Flat):
    """Every `every` steps the k largest of each tile of 4096, as 2 bits, with error feedback
    (arXiv 2508.15706).

    Args:
        every: steps between exchanges.
        k: entries of 4096.
        decay: of what was not sent.
        outer_lr: of the mean.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        every: int = 30,
        k: int = 64,
        decay: float = 0.95,
        outer_lr: float = 1.0,
    ) -> None:
        super().__init__(weights)
        self.every, self.k, self.decay, self.outer_lr = every, k, decay, outer_lr
        self.residual = torch.zeros(self.n, self.elements, device=weights[0].device)

    def exchange(self, x: Tensor, w: Tensor) -> bool:
        if self.steps % self.every:
            return False
        self.residual = self.decay * self.residual + (x - w)
        mask, tiles = _top(self.residual, self.k)
        # Two levels a sign, at the means of the smaller and of the larger half.
        size = tiles.abs() * mask
        middle = size.sum(2, keepdim=True) / mask.sum(2, keepdim=True)
        q = torch.zeros_like(tiles)
        for part in (mask & (size <= middle), mask & (size > middle)):
            level = (size * part).sum(2, keepdim=True) / part.sum(2, keepdim=True).clamp(min=1)
            q += part * level
        sent = (q * tiles.sign()).view(self.n, -1)[:, : self.elements]
        self.residual -= sent
        w += self.outer_lr * sent.mean(0)
        x.copy_(w.expand_as(x))
        choices = math.lgamma(TILE + 1) - math.lgamma(self.k + 1) - math.lgamma(TILE - self.k + 1)
        self.bits += self.elements / TILE * (choices / math.log(2) + 2 * self.k)
        return True


class Sparta(_Flat):
    """At each step a shared random part of the weights becomes its mean (EXO labs, 2025).

    Args:
        part: of the weights.
        seed: of the choice.
    """

    def __init__(self, weights: Sequence[Tensor], part: float = 0.0006, seed: int = 1) -> None:
        super().__init__(weights)
        self.chosen = max(1, round(part * self.elements))
        self.generator = torch.Generator().manual_seed(seed)

    def exchange(self, x: Tensor, w: Tensor) -> bool:
        at = torch.randperm(self.elements, generator=self.generator)[: self.chosen]
        x[:, at] = x[:, at].mean(0)
        self.bits += 32 * self.chosen
        return True

    def reference(self, weights: Sequence[Tensor]) -> list[Tensor] | None:
        return None


class PowerSgd(Method):
    """Gradients of rank 1 with error feedback (arXiv 1905.13727), of `every` steps together.

    Matrices only; what has one dimension is sent as it is.

    Args:
        every: steps whose gradients are added up before an exchange and a step of the optimizer.
    """

    def __init__(self, weights: Sequence[Tensor], every: int = 1) -> None:
        super().__init__()
        self.every, self.steps = every, 0
        self.sums = [torch.zeros_like(tensor) for tensor in weights]
        self.errors = [torch.zeros_like(tensor) for tensor in weights]
        generator = torch.Generator().manual_seed(0)
        self.q = [
            torch.randn(tensor[0].flatten(1).shape[1], generator=generator).to(tensor.device)
            if tensor.dim() > 2
            else None
            for tensor in weights
        ]

    def reduce(self, gradients: Sequence[Tensor]) -> bool:
        self.steps += 1
        for total, gradient in zip(self.sums, gradients, strict=True):
            total += gradient / self.every
        if self.steps % self.every:
            return False
        for i, (total, gradient) in enumerate(zip(self.sums, gradients, strict=True)):
            q = self.q[i]
            if q is None:
                gradient.copy_(total.mean(0))
                self.bits += 32 * total[0].numel()
            else:
                matrices = (total + self.errors[i]).flatten(2)
                p = functional.normalize((matrices @ q).mean(0), dim=0)
                self.q[i] = q = (matrices.transpose(1, 2) @ p).mean(0)
                mean = torch.outer(p, q)
                self.errors[i] = (matrices - mean).view_as(total)
                gradient.copy_(mean.view_as(total[0]))
                self.bits += 32 * (len(p) + len(q))
            total.zero_()
        return True


def _divisor(size: int, most: int = 64) -> int:
    """The largest divisor of at most `most`."""
    return max(d for d in range(1, min(size, most) + 1) if size % d == 0)


def _dct(size: int, device: torch.device) -> Tensor:
    """The orthonormal DCT-II, [frequency, place]."""
    place = torch.arange(size, device=device)
    basis = torch.cos(math.pi / size * (place + 0.5) * place[:, None]) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


class Demo(Method):
    """Decoupled momentum: of a momentum the largest DCT coefficients of each block are sent and
    taken out of it, and the optimizer steps by the sign of their mean (arXiv 2411.19870).

    Args:
        k: coefficients of a block of 64 x 64, and of smaller ones in proportion, at least 1.
        decay: of the momentum.
        value_bits: of a coefficient as it is counted; 1: its sign is sent.
    """

    signs = True

    def __init__(
        self, weights: Sequence[Tensor], k: int = 6, decay: float = 0.999, value_bits: int = 1
    ) -> None:
        super().__init__()
        self.k, self.decay, self.value_bits = k, decay, value_bits
        self.momenta = [torch.zeros_like(tensor) for tensor in weights]

    def reduce(self, gradients: Sequence[Tensor]) -> bool:
        for momentum, gradient in zip(self.momenta, gradients, strict=True):
            momentum.mul_(self.decay).add_(gradient)
            matrices = momentum.flatten(2) if momentum.dim() > 2 else momentum[:, None]
            height, width = matrices.shape[1:]
            rows, columns = _divisor(height), _divisor(width)
            down, across = _dct(rows, momentum.device), _dct(columns, momentum.device)
            blocks = matrices.unfold(1, rows, rows).unfold(2, columns, columns)
            coefficients = torch.einsum("ur,nabrc,vc->nabuv", down, blocks, across).flatten(3)
            size = rows * columns
            kept = max(1, self.k * size // TILE)
            index = coefficients.abs().topk(kept, dim=3).indices
            sent = torch.zeros_like(coefficients).scatter_(3, index, coefficients.gather(3, index))

            def back(values: Tensor, shape: torch.Size, basis: tuple[Tensor, Tensor]) -> Tensor:
                tiles = values.unflatten(3, (len(basis[0]), len(basis[1])))
                tiles = torch.einsum("ur,nabuv,vc->narbc", basis[0], tiles, basis[1])
                return tiles.reshape(len(values), *shape)

            momentum -= back(sent, momentum.shape[1:], (down, across))
            if self.value_bits == 1:
                sent = sent.sign()
            mean = sent.mean(0, keepdim=True)
            gradient.copy_(back(mean, momentum.shape[1:], (down, across)).sign())
            choices = math.lgamma(size + 1) - math.lgamma(kept + 1) - math.lgamma(size - kept + 1)
            blocks_in_all = coefficients.shape[1] * coefficients.shape[2]
            self.bits += blocks_in_all * (choices / math.log(2) + kept * self.value_bits)
        return True


METHODS: dict[str, Callable[..., Method]] = {
    "alone": lambda _weights: Alone(),
    "weights": Weights,
    "diloco": DiLoCo,
    "sparseloco": SparseLoCo,
    "sparta": Sparta,
    "powersgd": PowerSgd,
    "demo": Demo,
}
"""Name -> what makes the method, from the weights and the settings of the method."""


def make(
    name: str, weights: Sequence[Tensor], settings: dict[str, Any], normalises: bool
) -> Method:
    """The method of this name.

    Args:
        normalises: whether the optimizer's steps have a length of their own, as Adam's; where they
            have not, as SGD's, the backend's own gain is 1.
    """
    if name == "weights" and not normalises:
        settings = {"gain": 1.0, **settings}
    return METHODS[name](weights, **settings)
