"""What the bench trains: the quick start's GPT, and the tensors of GPT-2 small with a stated time.

A step of either is one call and one backward; nothing here knows of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class QuickStart(nn.Module):
    """As many tensors, of the same shapes, as integration/train_gpt.py trains by default."""

    vocabulary, block, width, batch = 65, 64, 192, 8

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(self.vocabulary, self.width)
        self.places = nn.Embedding(self.block, self.width)
        layer = nn.TransformerEncoderLayer(
            self.width, nhead=6, dim_feedforward=4 * self.width, dropout=0.0,
            activation="gelu", batch_first=True, norm_first=True, bias=False,
        )  # fmt: skip
        norm = nn.LayerNorm(self.width, bias=False)
        self.blocks = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
        self.head = nn.Linear(self.width, self.vocabulary, bias=False)
        # Not a buffer, which DDP would broadcast in each step: the quick start's model has none.
        self._mask = nn.Transformer.generate_square_subsequent_mask(self.block)

    def forward(self, text: Tensor) -> Tensor:
        """Loss of characters [batch, block + 1]."""
        inputs, targets = text[:, :-1], text[:, 1:]
        x = self.characters(inputs) + self.places(torch.arange(self.block))
        logits = self.head(self.blocks(x, mask=self._mask, is_causal=True))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def inputs(self) -> Tensor:
        return torch.randint(self.vocabulary, (self.batch, self.block + 1))

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


def gpt2_small(width: int = 768, layers: int = 12) -> list[list[tuple[int, ...]]]:
    """Shapes of GPT-2 small's 148 tensors, layer by layer (the head is tied to the embedding)."""
    layer: list[tuple[int, ...]] = [
        (width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,),
        (width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return [[(50257, width), (1024, width)], *([layer] * layers), [(width,), (width,)]]


class Pace:
    """Sleeps so that a step's stages end at their times, whatever they compute until then."""

    def __init__(self, seconds: float, stages: int) -> None:
        # A backward takes twice the time of a forward.
        self._forward = seconds / 3 / stages
        self._backward = 2 * self._forward
        self._next = 0.0

    def begin(self) -> None:
        self._next = time.perf_counter()

    def forward(self) -> None:
        self._sleep(self._forward)

    def backward(self) -> None:
        self._sleep(self._backward)

    def _sleep(self, seconds: float) -> None:
        self._next += seconds
        time.sleep(max(0.0, self._next - time.perf_counter()))


class _Layer(torch.autograd.Function):
    """Takes its time forwards and backwards; its gradients are given, and dense."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pace: Pace, gradients: Tensor, *weights: Tensor) -> Tensor:  # noqa: ANN401
        ctx.pace, ctx.gradients, ctx.shapes = pace, gradients, [w.shape for w in weights]
        pace.forward()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        ctx.pace.backward()
        gradients = (ctx.gradients[: shape.numel()].view(shape) for shape in ctx.shapes)
        return above[0], None, None, *gradients


class Gpt2Small(nn.Module):
    """The 124 439 808 weights of GPT-2 small; the computation is a stated time.

    The time includes the writing of the gradients, which are the same random numbers in each step.
    """

    def __init__(self, compute_seconds: float) -> None:
        super().__init__()
        layers = gpt2_small()
        self.layers = nn.ModuleList(
            nn.ParameterList(torch.zeros(shape) for shape in layer) for layer in layers
        )
        self._pace = Pace(compute_seconds, len(layers))
        self._gradients = torch.randn(max(p.numel() for p in self.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        self._pace.begin()
        for layer in self.layers:
            x = _Layer.apply(x, self._pace, self._gradients, *layer.parameters())
        return x.sum()

    def inputs(self) -> Tensor:
        # It needs a gradient, or autograd would not come to the first layer before its weights.
        return torch.zeros(1, requires_grad=True)

    def optimizer(self) -> torch.optim.Optimizer:
        # AdamW would need another 1 GB a rank and twice the memory traffic.
        return torch.optim.SGD(self.parameters(), lr=1e-4, fused=True)


MODELS: dict[str, Callable[[float], QuickStart | Gpt2Small]] = {
    "quickstart": lambda _: QuickStart(),
    "124m": Gpt2Small,
}
"""Name -> what makes it, given the seconds that computing is stated to take."""
