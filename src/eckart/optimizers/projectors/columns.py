"""Some columns or rows of the gradient, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.optimizers.modes import Factors
from eckart.optimizers.projectors.base import Draw, Projector, Side


@dataclass(frozen=True)
class Columns(Projector):
    """A random choice of columns (`right`) or rows (`left`): no product, and an index instead of a basis."""

    side: Side = "right"

    def find(self, A: Tensor, ranks: Mapping[int, int], old: Factors, draw: Draw) -> dict[int, Tensor]:
        generator = torch.Generator().manual_seed(draw.number)
        return {
            mode: torch.randperm(A.shape[mode], generator=generator)[:r].sort().values.to(A.device, torch.int32)
            for mode, r in ranks.items()
        }

    def nbytes(self, shape: tuple[int, ...], ranks: Mapping[int, int], dtype: torch.dtype) -> int:
        return sum(4 * r for r in ranks.values())
