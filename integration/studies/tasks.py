"""What a study trains: models that return their own loss, and batches of real data for them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_gpt import DATA, GPT  # the quick start's own model

Batch = tuple[Tensor, Tensor]


class Task(Protocol):
    """A model and its data.

    `model`'s forward takes a batch's inputs and targets and returns the mean loss. `draw` gives the
    rows of one participant's next batch; all that is random in it comes from the generator.
    """

    def model(self) -> nn.Module: ...
    def draw(self, size: int, generator: torch.Generator) -> Batch: ...
    def validation(self) -> list[Batch]: ...


class _Text:
    """Windows of a sequence of codes; the last tenth is for validation."""

    def __init__(self, codes: Tensor, block: int, windows: int = 256) -> None:
        self.block = block
        self.training, self.held_out = codes[: len(codes) * 9 // 10], codes[len(codes) * 9 // 10 :]
        self.starts = torch.linspace(0, len(self.held_out) - block - 1, windows).long()

    def _windows(self, codes: Tensor, starts: Tensor) -> Batch:
        rows = codes[starts[:, None] + torch.arange(self.block + 1)].long()
        return rows[:, :-1], rows[:, 1:]

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        starts = torch.randint(len(self.training) - self.block, (size,), generator=generator)
        return self._windows(self.training, starts)

    def validation(self) -> list[Batch]:
        return [self._windows(self.held_out, some) for some in self.starts.split(64)]


def _characters() -> tuple[Tensor, int]:
    text = DATA.read_text(encoding="utf-8")
    alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([alphabet[character] for character in text]), len(alphabet)


class CharacterGpt(_Text):
    """The quick start's model and text, at any width."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4, block: int = 64) -> None:
        codes, self.vocabulary = _characters()
        super().__init__(codes, block)
        self.width, self.layers, self.heads = width, layers, heads

    def model(self) -> nn.Module:
        return GPT(self.vocabulary, self.block, self.layers, self.heads, self.width)


class ByteGpt(_Text):
    """A GPT over the bytes of the Python sources of torch: 30 MB that are at hand with torch."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4, block: int = 128) -> None:
        # In an order that mixes the packages, so that the held-out tenth is like the rest.
        files = sorted(
            Path(torch.__file__).parent.rglob("*.py"), key=lambda path: (path.name, str(path))
        )
        data = b"".join(path.read_bytes() for path in files)
        super().__init__(torch.frombuffer(bytearray(data), dtype=torch.uint8), block)
        self.width, self.layers, self.heads = width, layers, heads

    def model(self) -> nn.Module:
        return GPT(256, self.block, self.layers, self.heads, self.width)


class _NextCharacter(nn.Module):
    """Bengio's language model: embeddings of the last characters, two hidden layers."""

    def __init__(self, vocabulary: int, block: int, width: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, 32)
        self.layers = nn.Sequential(
            nn.Linear(32 * block, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, vocabulary),
        )

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.layers(self.characters(inputs).flatten(1))
        return functional.cross_entropy(logits, targets[:, -1])


class CharacterMlp(_Text):
    """An MLP with embeddings: the next character from the last eight."""

    def __init__(self, width: int = 256, block: int = 8) -> None:
        codes, self.vocabulary = _characters()
        super().__init__(codes, block, windows=4096)
        self.width = width

    def model(self) -> nn.Module:
        return _NextCharacter(self.vocabulary, self.block, self.width)


TASKS: dict[str, Callable[..., Task]] = {
    "chargpt": CharacterGpt,
    "bytegpt": ByteGpt,
    "charmlp": CharacterMlp,
}
"""Name -> what makes the task, from the settings of its size."""
