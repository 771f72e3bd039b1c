"""Inputs weighted by the Fisher information of their weights (FWSVD, Hsu et al., arXiv 2207.00112, eq. 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import DiagonalRoot, damped_diagonal
from eckart.metrics.base import METRICS, Metric
from eckart.metrics.statistics import Statistics


@METRICS.word("fisher_rows")
@dataclass(frozen=True)
class FisherRows(Metric):
    """|| (W - Ŵ) diag(sqrt(f)) ||_F with f_j the squared per-example gradients of the weights of input j, summed.

    The paper writes a layer as x M, whose rows are inputs; here they are the columns of W.

    Args:
        damping: the least f, relative to the mean one.
    """

    damping: float = 1e-5

    needs: ClassVar[frozenset[str]] = frozenset({"fisher_in"})

    def weighting(self, statistics: Statistics, where: str = "") -> Weighting:
        f = damped_diagonal(statistics.mean("fisher_in", where), self.damping, where)
        return Weighting(right=DiagonalRoot(f.sqrt()))
