"""Rows of a table weighted by how often they are looked up (AFM, arXiv 2405.18146)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64
from torch import Tensor

from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import Damped, DiagonalRoot, damped_diagonal
from eckart.metrics.base import Metric
from eckart.metrics.statistics import Statistics
from eckart.remarks import remark


@dataclass(frozen=True)
class RowFrequencies(Metric):
    """sum_v f_v || e_v - ê_v ||² over the rows e_v of a table: the mean squared error of a looked-up vector.

    What a table reads is one-hot, so that this is what the input covariance of a linear layer comes to; it weights the
    rows of the matrix, which are the table's inputs. No word of the metrics' language stands for it: recipes that ask
    for a covariance of inputs get it for their tables.

    Args:
        damping: the least f, relative to the mean one: rows that were never seen keep a finite weight.
    """

    damping: float = 1e-9

    word: ClassVar[str] = "row_frequencies"
    needs: ClassVar[frozenset[str]] = frozenset({"counts"})

    def frequencies(self, statistics: Statistics, where: str = "") -> Float64[Tensor, " rows"]:
        """How often each row is looked up; they add up to 1. Raises `ValueError` where no row ever was."""
        if not statistics.tokens:
            text = "is never looked up by the calibration data: give data that reaches it, or leave it out of `targets`"
            raise ValueError(f"{where or 'a table'} {text}")
        f = damped_diagonal(statistics.mean("counts", where), self.damping, where)
        return f / f.sum()

    def weighting(self, statistics: Statistics, where: str = "") -> Weighting:
        f = self.frequencies(statistics, where)
        unseen = int((statistics.sums["counts"] == 0).sum())
        if unseen:
            text = f"{unseen} of {f.shape[0]} rows of {where or 'a table'} are never looked up by the calibration data"
            remark(f"{text}: they count for next to nothing", Damped)
        return Weighting(left=DiagonalRoot(f.sqrt()))
