"""Pruning by weights times the norms of their inputs."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.forms import Form, Sparse
from eckart.forms.selections import Wanda
from eckart.jobs.recipe import Recipe
from eckart.metrics import ActivationDiagonal, Metric
from eckart.registry import method


@method("wanda", family="sparse", paper="A Simple and Effective Pruning Approach for Large Language Models, Sun et al., ICLR 2024, arXiv 2306.11695")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class WandaPruning(Recipe):
    """Keep the weights with the largest |w_ij| ||x_j|| of every row (eq. 1), block by block on the pruned model.

    For n:m, `form="semi_sparse(selection=wanda())"`. The metric is the error of single weights in the layer's output,
    couplings left out, of which this selection is the least. Inputs that are never active count for a ten-thousandth
    of the mean one and not for nothing, so that their weights are ordered by magnitude.
    """

    form: Form = field(default_factory=lambda: Sparse(selection=Wanda()))
    metric: Metric = field(default_factory=lambda: ActivationDiagonal(power=1.0, statistic="rms"))
    one_shot: bool = False
