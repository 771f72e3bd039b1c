"""Truncation on the principal components of the layer's output, with its mean in the bias."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.jobs.recipe import Recipe
from eckart.metrics import Metric, OutputCovariance
from eckart.registry import method


@method("lord", family="low-rank", paper="LORD: Low Rank Decomposition Of Monolingual Code LLMs For One-Shot Compression, Kaushal et al., 2023, arXiv 2309.14021")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class LoRD(Recipe):
    """Project outputs on the leading eigenvectors of their covariance; what the mean loses goes into the bias.

    Departs from the paper: ranks come from the allocator (uniform here) instead of a sweep over perplexities, and the
    covariance of outputs is taken from the moments of the inputs, which is exact.
    """

    metric: Metric = field(default_factory=OutputCovariance)
