"""Errors as the data sees them: || (W - Ŵ) X || over calibration inputs (SVD-LLM, arXiv 2403.07378, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import Damped, psd_root
from eckart.metrics.base import METRICS, Metric, covariance
from eckart.metrics.statistics import Statistics
from eckart.remarks import remark


@METRICS.word("input_covariance")
@dataclass(frozen=True)
class InputCovariance(Metric):
    """|| (W - Ŵ) S ||_F with S Sᵀ = E[x xᵀ]: the mean squared error of the layer's output.

    Args:
        damping: added to the diagonal, relative to its mean.
        root: `cholesky` or `eigen`; the error is the same, the eigen root is exact on singular covariances.
    """

    damping: float = 1e-6
    root: str = "cholesky"

    needs: ClassVar[frozenset[str]] = frozenset({"outer"})
    centred: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.root not in ("cholesky", "eigen"):
            raise ValueError(f"{self.word}(root={self.root!r}): it is 'cholesky' or 'eigen'")  # type: ignore[attr-defined]

    def weighting(self, statistics: Statistics, where: str = "") -> Weighting:
        C, mean = covariance(statistics, self.centred, where)
        if statistics.tokens < C.shape[0]:
            text = f"{where or 'a layer'} saw {statistics.tokens} tokens for {C.shape[0]} inputs"
            remark(f"{text}: its covariance is rank-deficient and was damped", Damped)
        return Weighting(right=psd_root(C, self.damping, self.root, where), mean=mean)  # type: ignore[arg-type]
