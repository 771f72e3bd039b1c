"""A table of values for every row by sensitivity-weighted k-means, and a few weights kept exact."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.forms import Form, Quantized, Sparse
from eckart.forms.levels import Learned
from eckart.forms.with_outliers import WithOutliers
from eckart.jobs.recipe import Recipe
from eckart.metrics import Fisher, Metric
from eckart.registry import method


@method("squeezellm", family="quantised", paper="SqueezeLLM: Dense-and-Sparse Quantization, Kim et al., ICML 2024, arXiv 2306.07629")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class SqueezeLLM(Recipe):
    """Rows share 2^b values, the centres of their weights under the Fisher information; 0.45% of weights stay exact.

    Departs from the paper: which weights stay exact is not set by two quantiles (the most sensitive, the largest) but
    by turns with the k-means, each time those whose coded error counts most; and k-means on a line is nearly exact
    where the authors' restarts from chance.
    """

    form: Form = field(
        default_factory=lambda: WithOutliers(Quantized(group=None, grid=Learned()), Sparse(density=0.0045))
    )
    metric: Metric = field(default_factory=Fisher)
