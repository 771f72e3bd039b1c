"""What a loop trains on: windows of text, or examples with labels, asked for batch by batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from eckart.calibration.tokens import Tokens

NOTHING = -100
"""The label of a token that is not judged."""

Rows = Int[Tensor, " rows"]


class Batches(Protocol):
    """Data by number of row."""

    def __len__(self) -> int: ...

    def batch(self, rows: Rows) -> dict[str, Any]:
        """Arguments of the model, labels included."""

    def targets(self, rows: Rows) -> int:
        """How many labels the model's loss on these rows is the mean of."""

    def fingerprint(self) -> str:
        """A hash of the data."""


@dataclass(frozen=True)
class Windows:
    """Windows of text, of which every token but the first is foretold."""

    tokens: Tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: Rows) -> dict[str, Any]:
        ids, mask = self.tokens.ids[rows], self.tokens.mask[rows]
        found = {"input_ids": ids, "labels": ids.masked_fill(~mask, NOTHING), "use_cache": False}
        return found if bool(mask.all()) else {**found, "attention_mask": mask.long()}

    def targets(self, rows: Rows) -> int:
        return int(self.tokens.mask[rows][:, 1:].sum())

    def fingerprint(self) -> str:
        return hashlib.sha256(self.tokens.ids.numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Example:
    """Token ids, and for each of them its label (the id itself, or `NOTHING`); or one label, the number of a class."""

    ids: list[int]
    labels: list[int] | int


class Examples:
    """Examples of different lengths, each batch filled up on the right.

    Args:
        examples: all with labels of one kind.
        pad: the id that fills up.
    """

    def __init__(self, examples: Sequence[Example], pad: int):
        self.examples, self.pad = list(examples), pad

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, rows: Rows) -> dict[str, Any]:
        chosen = [self.examples[i] for i in rows.tolist()]
        length = max(len(e.ids) for e in chosen)
        ids = torch.tensor([e.ids + [self.pad] * (length - len(e.ids)) for e in chosen])
        mask = torch.arange(length) < torch.tensor([[len(e.ids)] for e in chosen])
        labels = [e.labels if isinstance(e.labels, int) else e.labels + [NOTHING] * (length - len(e.ids)) for e in chosen]  # fmt: skip # noqa: E501
        found = {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.tensor(labels)}
        return found if isinstance(labels[0], int) else {**found, "use_cache": False}

    def targets(self, rows: Rows) -> int:
        return sum(judged(self.examples[i].labels) for i in rows.tolist())

    def fingerprint(self) -> str:
        words = json.dumps([[e.ids, e.labels] for e in self.examples])
        return hashlib.sha256(words.encode()).hexdigest()[:16]

    def split(self, count: int, seed: int) -> tuple[Examples, Examples]:
        """Two parts, the second of so many examples that the seed draws."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        border = len(self) - count
        first, second = ([self.examples[i] for i in part] for part in (order[:border], order[border:]))
        return Examples(first, self.pad), Examples(second, self.pad)


def judged(labels: list[int] | int) -> int:
    """How many labels of an example count."""
    return 1 if isinstance(labels, int) else sum(label != NOTHING for label in labels[1:])


def on(device: torch.device, inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model with their tensors on its device."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
