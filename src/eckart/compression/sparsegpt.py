"""Pruning with what is lost taken over by the weights that stay."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.forms import Form, Sparse
from eckart.forms.selections import OBS
from eckart.jobs.recipe import Recipe
from eckart.metrics import InputCovariance, Metric
from eckart.registry import method


@method("sparsegpt", family="sparse", paper="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, Frantar and Alistarh, ICML 2023, arXiv 2301.00774")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class SparseGPT(Recipe):
    """Optimal brain surgeon column by column (algorithm 1), block by block on the pruned model.

    For n:m, `form="semi_sparse(selection=obs())"`; for sparse and quantised weights, the sum of both forms.
    """

    form: Form = field(default_factory=lambda: Sparse(selection=OBS()))
    metric: Metric = field(default_factory=lambda: InputCovariance(damping=1e-9))
    one_shot: bool = False
