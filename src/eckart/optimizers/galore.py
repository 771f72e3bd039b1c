"""GaLore: moments in the leading subspace of the gradient, which is chosen anew now and then."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from eckart.optimizers.presets import rule_for
from eckart.optimizers.projected import Projected
from eckart.optimizers.projectors import SVD
from eckart.optimizers.projectors.base import Side
from eckart.optimizers.projectors.svd import Route
from eckart.optimizers.refresh import Every
from eckart.optimizers.rules import Rule
from eckart.registry import method


@method("galore", family="optimiser", paper="GaLore, Zhao et al., ICML 2024, arXiv 2403.03507")
class GaLore(Projected):
    """Adam on gradients projected onto their leading singular vectors (algorithm 2); weights stay of full rank.

    Tensors with more than two modes are projected along all of them (Tucker).

    Args:
        params: groups with a `rank` are projected (`eckart.optimizers.param_groups` makes them).
        lr: learning rate; projected parameters move at scale * lr.
        betas, eps: of Adam; eps is added to the root as it is, before bias correction.
        weight_decay: decoupled, applied after the update.
        rank: of groups that have none of their own; None leaves them as they are.
        interval: T, updates between two decompositions.
        scale: alpha.
        side: which side of a matrix shrinks: std, reverse, left, right or full.
        inner: `adam`, `adam8bit` (blockwise 8-bit moments), `adafactor`, `sgd`, `lion`, or a `Rule`.
        svd: how singular vectors are found: `auto` the cheapest accurate way, `lapack` as released, signs and all.
        warm: steps of power iteration from the last basis instead of a decomposition; 0 decomposes.
        stagger: spread the refreshes of the parameters over the interval.
        foreach, seed: see `Projected`.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.0, *, rank: int | None = None, interval: int = 200, scale: float = 0.25,
        side: Side = "std", inner: str | Rule = "adam", svd: Route = "auto", warm: int = 0, stagger: bool = False,
        foreach: bool | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(
            params, projector=SVD(side, warm, svd), inner=rule_for(inner, betas, eps, eps_corrected=False),
            refresh=Every(stagger), lr=lr, weight_decay=weight_decay, rank=rank, interval=interval, scale=scale,
            foreach=foreach, seed=seed,
        )  # fmt: skip
