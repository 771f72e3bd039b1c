"""Random subspaces, which need no look at the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from eckart.linalg.power import orthonormalise, random_basis
from eckart.optimizers.modes import Factors
from eckart.optimizers.projectors.base import Draw, Projector


@dataclass(frozen=True)
class Random(Projector):
    """A uniformly random subspace (FRUGAL, section 4; Flora draws Gaussian ones)."""

    def find(self, A: Tensor, ranks: Mapping[int, int], old: Factors, draw: Draw) -> dict[int, Tensor]:
        return {
            mode: orthonormalise(random_basis(A.shape[mode], r, draw.number * 31 + mode, A))[0]
            for mode, r in ranks.items()
        }
