"""Pruning of the smallest weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.forms import Form, Sparse
from eckart.forms.selections import Magnitude
from eckart.jobs.recipe import Recipe
from eckart.registry import method


@method("magnitude", family="sparse", paper="Learning both Weights and Connections for Efficient Neural Networks, Han et al., NeurIPS 2015, arXiv 1506.02626")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class MagnitudePruning(Recipe):
    """Keep the largest weights of every matrix: needs no data, and is the baseline of all pruning.

    Departs from the paper: nothing is trained again afterwards. `form="semi_sparse(selection=magnitude())"` and other
    sparse forms keep the largest in their patterns.
    """

    form: Form = field(default_factory=lambda: Sparse(selection=Magnitude()))
