"""What a study trains: models that return their own loss, and batches of real data for them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
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

    `model`'s forward takes a batch's inputs and targets and returns the mean loss; where the task
    `classifies`, it returns scores [rows, classes] of inputs alone. `draw` gives the rows of one
    participant's next batch; all that is random in it comes from the generator.
    """

    classifies: bool

    def model(self) -> nn.Module: ...
    def draw(self, size: int, generator: torch.Generator) -> Batch: ...
    def validation(self) -> list[Batch]: ...


class _Text:
    """Windows of a sequence of codes; the last tenth is for validation."""

    classifies = False

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


def _sources(folder: Path) -> list[Path]:
    """Python sources, in an order that mixes packages: the held-out tenth is like the rest."""
    return sorted(folder.rglob("*.py"), key=lambda path: (path.name, str(path)))


def _bytes_of(files: Iterable[Path]) -> Tensor:
    data = b"".join(path.read_bytes() for path in files)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class ByteGpt(_Text):
    """A GPT over the bytes of the Python sources of torch: 30 MB that are at hand with torch."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4, block: int = 128) -> None:
        super().__init__(_bytes_of(_sources(Path(torch.__file__).parent)), block)
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
            nn.LayerNorm(width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.GELU(),
            nn.Linear(width, vocabulary),
        )

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        scores: Tensor = self.layers(self.characters(inputs).flatten(1))
        return scores if targets is None else functional.cross_entropy(scores, targets)


class CharacterMlp(_Text):
    """An MLP with embeddings: the next character from the last eight."""

    classifies = True

    def __init__(self, width: int = 256, block: int = 8) -> None:
        codes, self.vocabulary = _characters()
        super().__init__(codes, block, windows=4096)
        self.width = width

    def _windows(self, codes: Tensor, starts: Tensor) -> Batch:
        inputs, targets = super()._windows(codes, starts)
        return inputs, targets[:, -1]

    def model(self) -> nn.Module:
        return _NextCharacter(self.vocabulary, self.block, self.width)


class _WindowCnn(nn.Module):
    """Embeddings of bytes, three convolutions with norms, and the mean over places."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, 16)
        self.layers = nn.Sequential(
            nn.Conv1d(16, width // 2, 5, stride=2),
            nn.GroupNorm(1, width // 2),
            nn.GELU(),
            nn.Conv1d(width // 2, width, 5, stride=2),
            nn.GroupNorm(1, width),
            nn.GELU(),
            nn.Conv1d(width, width, 5, stride=2),
            nn.GroupNorm(1, width),
            nn.GELU(),
        )
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        scores: Tensor = self.head(self.layers(self.bytes(inputs).transpose(1, 2)).mean(2))
        return scores if targets is None else functional.cross_entropy(scores, targets)


class ByteCnn:
    """A CNN that tells from which package of torch a piece of source is, of the eight largest."""

    classifies = True
    CLASSES = 8

    def __init__(self, width: int = 64, block: int = 128) -> None:
        self.width, self.block = width, block
        root = Path(torch.__file__).parent
        packages = [_sources(path) for path in sorted(root.iterdir()) if path.is_dir()]
        self.codes = sorted(map(_bytes_of, filter(None, packages)), key=len)[-self.CLASSES :]

    def _windows(self, targets: Tensor, places: Tensor, held_out: bool) -> Batch:
        """`places`, from 0 to 1: where in the package's training or held-out part."""
        inputs = []
        for target, place in zip(targets.tolist(), places.tolist(), strict=True):
            codes = self.codes[target]
            cut = len(codes) * 9 // 10
            codes = codes[cut:] if held_out else codes[:cut]
            start = int(place * (len(codes) - self.block))
            inputs.append(codes[start : start + self.block])
        return torch.stack(inputs).long(), targets

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        targets = torch.randint(self.CLASSES, (size,), generator=generator)
        return self._windows(targets, torch.rand(size, generator=generator), held_out=False)

    def validation(self) -> list[Batch]:
        targets = torch.arange(2048) % self.CLASSES
        places = torch.arange(2048) // self.CLASSES / (2048 // self.CLASSES)
        rows = zip(targets.split(256), places.split(256), strict=True)
        return [self._windows(*some, held_out=True) for some in rows]

    def model(self) -> nn.Module:
        return _WindowCnn(self.CLASSES, self.width)


TASKS: dict[str, Callable[..., Task]] = {
    "chargpt": CharacterGpt,
    "bytegpt": ByteGpt,
    "charmlp": CharacterMlp,
    "bytecnn": ByteCnn,
}
"""Name -> what makes the task, from the settings of its size."""
