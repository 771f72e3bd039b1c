"""Plain truncation of every weight."""

from __future__ import annotations

from dataclasses import dataclass

from eckart.jobs.recipe import Recipe
from eckart.registry import method


@method(
    "svd", family="low-rank", paper="The approximation of one matrix by another of lower rank, Eckart and Young, 1936"
)
@dataclass(frozen=True)
class SVD(Recipe):
    """Truncated SVD of each weight in the Frobenius norm: needs no data, and is the baseline of all others."""
