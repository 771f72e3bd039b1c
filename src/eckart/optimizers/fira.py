"""Fira: GaLore that keeps the rest of the gradient, scaled as Adam scales the projection."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from eckart.optimizers.projected import Projected
from eckart.optimizers.projectors import SVD, Projector
from eckart.optimizers.projectors.base import Side
from eckart.optimizers.refresh import Every
from eckart.optimizers.residual import NormScaled
from eckart.optimizers.rules import Adam
from eckart.registry import method


@method("fira", family="optimiser", paper="Fira, Chen et al., 2024, arXiv 2410.01623")
class Fira(Projected):
    """GaLore, with the rest of the gradient scaled by the norms' ratio and limited in growth: every step is full-rank.

    Args:
        params: groups with a `rank` are projected (`eckart.optimizers.param_groups` makes them).
        lr: learning rate.
        betas, eps: of Adam; eps is added to the root as it is, before bias correction.
        weight_decay: decoupled, applied after the update.
        rank: of groups that have none of their own; None leaves them as they are.
        interval: T, updates between two decompositions.
        scale: alpha of the projected part.
        growth: gamma of the norm-growth limiter; None does not limit.
        factors: the rest is scaled by `column` or, all of it alike, by `matrix`.
        overlap: the rest is G - alpha P Pᵀ G, as released; without it G - P Pᵀ G.
        side: which side of a matrix shrinks: std, reverse, left, right or full.
        projector: another projector than singular vectors.
        warm: steps of power iteration from the last basis instead of a decomposition; 0 decomposes.
        stagger: spread the refreshes of the parameters over the interval.
        foreach, seed: see `Projected`.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.0, *, rank: int | None = None, interval: int = 200, scale: float = 0.25,
        growth: float | None = 1.01, factors: Literal["column", "matrix"] = "column", overlap: bool = True,
        side: Side = "std", projector: Projector | None = None, warm: int = 0, stagger: bool = False,
        foreach: bool | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(
            params, projector=projector or SVD(side, warm), inner=Adam(betas, eps, eps_corrected=False),
            refresh=Every(stagger), residual=NormScaled(growth, factors, overlap), lr=lr, weight_decay=weight_decay,
            rank=rank, interval=interval, scale=scale, foreach=foreach, seed=seed,
        )  # fmt: skip
