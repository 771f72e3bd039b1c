"""Columns weighted by how large their inputs are (ASVD, Yuan et al., 2023, arXiv 2312.05821, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import DiagonalRoot, damped_diagonal
from eckart.metrics.base import METRICS, Metric
from eckart.metrics.statistics import Statistics


@METRICS.word("activation_diagonal")
@dataclass(frozen=True)
class ActivationDiagonal(Metric):
    """|| (W - Ŵ) diag(d) ||_F with d = (mean |x_j|)^power, or the root mean square to that power.

    Args:
        power: 0.5 is ASVD's; 1 with `statistic="rms"` is the diagonal of the input covariance.
        statistic: `abs` or `rms`.
        damping: the least d, relative to the mean one: dead inputs keep a finite weight.
    """

    power: float = 0.5
    statistic: str = "abs"
    damping: float = 1e-4

    needs: ClassVar[frozenset[str]] = frozenset({"abs", "square"})

    def __post_init__(self) -> None:
        if self.statistic not in ("abs", "rms"):
            raise ValueError(f"activation_diagonal(statistic={self.statistic!r}): it is 'abs' or 'rms'")

    def weighting(self, statistics: Statistics, where: str = "") -> Weighting:
        size = statistics.mean("abs", where) if self.statistic == "abs" else statistics.mean("square", where).sqrt()
        return Weighting(right=DiagonalRoot(damped_diagonal(size, self.damping, where) ** self.power))
