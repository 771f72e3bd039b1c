"""Truncation in the norm of the layer's output."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.jobs.recipe import Recipe
from eckart.metrics import InputCovariance, Metric
from eckart.registry import method


@method("svd_llm", family="low-rank", paper="SVD-LLM: Truncation-aware Singular Value Decomposition, Wang et al., ICLR 2025, arXiv 2403.07378")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class SVDLLM(Recipe):
    """Truncate W S with S Sᵀ = E[x xᵀ], so that the truncation error is the output error (section 3.2).

    Departs from the paper: the optimum is taken as the projection U_r U_rᵀ W, which equals it and never inverts S.
    The closed-form update of section 3.3 for high ratios is what `one_shot=False` does, layer by layer.
    """

    metric: Metric = field(default_factory=InputCovariance)
