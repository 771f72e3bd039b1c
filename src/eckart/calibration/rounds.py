"""The order in which batches come that are used more than once."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def rounds(count: int, generator: torch.Generator) -> Iterator[int]:
    """Whole numbers below `count`, without end unless there are none: round after round, each in a drawn order."""
    while count > 0:
        yield from torch.randperm(count, generator=generator).tolist()
