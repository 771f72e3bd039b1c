"""Leading singular vectors of the gradient; for tensors, of each of its unfoldings (a Tucker basis)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from eckart.linalg.power import BlockPower, orthonormalise, random_basis
from eckart.linalg.svd import truncated_svd
from eckart.optimizers.checks import is_whole
from eckart.optimizers.modes import Factors
from eckart.optimizers.projectors.base import Draw, Projector, unfolded

Route = Literal["auto", "exact", "gram", "randomized", "lapack"]


@dataclass(frozen=True)
class SVD(Projector):
    """The subspace that holds most of the gradient (GaLore, section 3.3); its singular values are not used.

    A singular vector's sign is arbitrary, and moments that are kept over a refresh depend on it: each vector gets the
    sign that agrees with its predecessor.

    Args:
        warm: 0 decomposes anew at every refresh. Above 0, so many steps of block power iteration from the last basis
            (the first one is that of a random sketch), which costs little more than a projection: no step stands out.
        route: of the truncated SVD, see `eckart.linalg.svd`; `lapack` is a whole one with the signs as they come, which
            is what the released GaLore does.
    """

    warm: int = 0
    route: Route = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.warm) or self.warm < 0:
            raise ValueError(f"warm is the number of power steps of a refresh, 0 or more, not {self.warm!r}")
        if self.route not in get_args(Route):
            raise ValueError(f"the route of a projector's SVD is one of {', '.join(get_args(Route))}, not {self.route!r}")  # fmt: skip # noqa: E501

    def limit(self, shape: tuple[int, ...], mode: int) -> int:
        return min(shape[mode], math.prod(size for other, size in enumerate(shape) if other != mode))

    def find(self, A: Tensor, ranks: Mapping[int, int], old: Factors, draw: Draw) -> dict[int, Tensor]:
        if self.warm:
            return {mode: self._followed(A, mode, r, old.get(mode), draw) for mode, r in ranks.items()}
        if A.dim() == 2:
            both = self._vectors(A, max(ranks.values()), draw)
            found = {mode: both[mode][:, :r].contiguous() for mode, r in ranks.items()}
        else:
            found = {mode: self._vectors(unfolded(A, mode), r, draw)[0] for mode, r in ranks.items()}
        if self.route == "lapack":
            return found
        return {mode: _agreeing(V, old.get(mode)) for mode, V in found.items()}

    def _vectors(self, A: Tensor, rank: int, draw: Draw) -> tuple[Tensor, Tensor]:
        """The leading left and right singular vectors, as columns."""
        if self.route == "lapack":
            U, _, Vh = torch.linalg.svd(A, full_matrices=False)
            return U[:, :rank], Vh[:rank].mT
        found = truncated_svd(A, rank, route=self.route, seed=draw.number)
        return found.U, found.Vh.mT

    def _followed(self, A: Tensor, mode: int, rank: int, old: Tensor | None, draw: Draw) -> Tensor:
        """The last basis after power steps, its columns in their places and with their signs; a sketch at first."""
        rows = A.mT if (A.dim(), mode) == (2, 1) else unfolded(A, mode)  # the mode's side is the first one
        if old is None:
            return orthonormalise(rows @ random_basis(rows.shape[1], rank, draw.number, rows))[0]
        power = BlockPower(rank, side="left")
        power.basis = old
        return power.update(rows, steps=self.warm)


def _agreeing(V: Tensor, old: Tensor | None) -> Tensor:
    """V, each column with the sign that makes its product with the old column positive."""
    if old is None or old.shape != V.shape:
        return V
    return torch.where((old * V).sum(0) < 0, -V, V)
