"""Truncation after scaling columns by how large their inputs are."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.jobs.recipe import Recipe
from eckart.metrics import ActivationDiagonal, Metric
from eckart.registry import method


@method("asvd", family="low-rank", paper="ASVD: Activation-aware Singular Value Decomposition, Yuan et al., 2023, arXiv 2312.05821")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class ASVD(Recipe):
    """Truncate W diag(d) with d = (mean |x|)^0.5 (section 3.2); ranks uniform, not searched on perplexity as there."""

    metric: Metric = field(default_factory=ActivationDiagonal)
