"""Every weight by its own Fisher information (SqueezeLLM, Kim et al., arXiv 2306.07629)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import DiagonalRoot, check_finite
from eckart.metrics.base import METRICS, Metric
from eckart.metrics.statistics import Statistics


@METRICS.word("fisher")
@dataclass(frozen=True)
class Fisher(Metric):
    """sum F (W - Ŵ)² with F the squared per-example gradients of each weight: the loss to second order, its Hessian
    taken to be diagonal.

    Solvers that need weights on two sides get the roots of F's row means and column means, scaled so that they
    multiply to F where that has rank one (LQ-LoRA, Guo et al., arXiv 2311.12023).

    Args:
        damping: the least F, relative to the mean one.
    """

    damping: float = 1e-5

    needs: ClassVar[frozenset[str]] = frozenset({"fisher"})

    def weighting(self, statistics: Statistics, where: str = "") -> Weighting:
        F = statistics.mean("fisher", where).double()
        check_finite(F, f"the diagonal weight{' of ' + where if where else ''}")
        mean = F.mean() if F.numel() else F.sum()
        F = F.clamp_min(self.damping * float(mean)) if float(mean) > 0 else F.new_ones(F.shape)
        rows, columns = (F.mean(1), F.mean(0)) if F.numel() else (F.new_ones(F.shape[0]), F.new_ones(F.shape[1]))
        total = F.mean() if F.numel() else 1.0
        return Weighting(DiagonalRoot(rows.sqrt()), DiagonalRoot((columns / total).sqrt()), each=F)
