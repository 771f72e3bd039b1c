"""Errors about the mean output, which a bias can carry (LoRD, arXiv 2309.14021; AFM, arXiv 2405.18146)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eckart.metrics.base import METRICS
from eckart.metrics.input_covariance import InputCovariance


@METRICS.word("output_covariance")
@dataclass(frozen=True)
class OutputCovariance(InputCovariance):
    """|| (W - Ŵ)(x - E x) || over the calibration inputs; what the mean loses goes into the bias.

    The best projection of rank r under it is onto the leading eigenvectors of the covariance of the outputs,
    Cov(y) = W Cov(x) Wᵀ, which is how the papers state it. Taking Cov(y) from the inputs' moments is exact and lets
    all layers that read one tensor share one sum.
    """

    damping: float = 1e-9

    needs: ClassVar[frozenset[str]] = frozenset({"outer", "x"})
    centred: ClassVar[bool] = True
