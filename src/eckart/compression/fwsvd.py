"""Truncation weighted by Fisher information."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.jobs.recipe import Recipe
from eckart.metrics import FisherRows, Metric
from eckart.registry import method


@method("fwsvd", family="low-rank", paper="Language model compression with weighted low-rank factorization, Hsu et al., ICLR 2022, arXiv 2207.00112")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class FWSVD(Recipe):
    """Truncate W diag(sqrt f), f_j the per-example squared gradients of input j's weights, summed over outputs (eq. 5).

    The gradients are of the language-modelling loss on the calibration text, one sequence an example; the fine-tuning
    that follows in the paper is a training job of its own.
    """

    metric: Metric = field(default_factory=FisherRows)
