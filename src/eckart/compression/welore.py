"""Truncation by one threshold on all normalised spectra."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.allocation import Allocator, SpectrumThreshold
from eckart.jobs.recipe import Recipe
from eckart.registry import method


@method("welore", family="low-rank", paper="From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients, Jaiswal et al., ICML 2025, arXiv 2407.11239")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class WeLore(Recipe):
    """Plain truncation; one threshold on singular values, scaled to [0, 1] per weight, sets all ranks (section 3.2).

    The threshold is searched for the byte budget, not for the paper's share of dropped ranks; weights whose kept rank
    would not save bytes stay dense. Fine-tuning only the factored weights is `adapters`' part.
    """

    allocation: Allocator = field(default_factory=SpectrumThreshold)
