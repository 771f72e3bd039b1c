"""Lion and its family: every convex function K is an optimiser with one momentum buffer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from eckart.optimizers.convex import L1, Convex
from eckart.optimizers.projected import Projected
from eckart.optimizers.projectors import SVD
from eckart.optimizers.rules import Lion
from eckart.registry import method


@method(
    "lion_k",
    family="optimiser",
    paper="Lion Secretly Solves Constrained Optimization, Chen et al., ICLR 2024, arXiv 2310.05898",
)
class LionK(Projected):
    """Minimises f(x) + K*(lambda x) / lambda, lambda the weight decay; with K the 1-norm, f where |x| <= 1/lambda.

    x <- (1 - lr lambda) x - lr dK(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g (equation 4). Weights that start
    outside of the bound are pulled in at the rate exp(-lambda t): give norm gains and embeddings no decay.

    Args:
        params: parameters or groups of them.
        lr: learning rate; three to ten times lower than AdamW's.
        betas: of the interpolation and of the momentum; the theory asks for the second to be the larger.
        weight_decay: lambda; the bound depends on it alone, not on lr.
        kernel: K, one of `eckart.optimizers.convex`, and of each parameter as a whole.
        rank, interval, scale: of projected groups, as in GaLore.
        foreach, seed: see `Projected`.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0, *, kernel: Convex | None = None, rank: int | None = None, interval: int = 200,
        scale: float = 1.0, foreach: bool | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(
            params, projector=SVD(), inner=Lion(betas, kernel or L1()), lr=lr, weight_decay=weight_decay, rank=rank,
            interval=interval, scale=scale, decay_first=True, foreach=foreach, seed=seed,
        )  # fmt: skip
