"""The Frobenius norm: every entry counts the same."""

from __future__ import annotations

from dataclasses import dataclass

from eckart.linalg.weighting import Weighting
from eckart.metrics.base import METRICS, Metric
from eckart.metrics.statistics import Statistics


@METRICS.word("plain")
@dataclass(frozen=True)
class Plain(Metric):
    """|| W - Ŵ ||_F, which no data informs."""

    def weighting(self, statistics: Statistics, where: str = "") -> Weighting:
        return Weighting()
