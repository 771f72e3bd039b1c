"""Dictionaries and sparse codes, learnt in the norm of the layer's output."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.forms import Form
from eckart.forms.dictionary import Dictionary
from eckart.jobs.recipe import Recipe
from eckart.metrics import InputCovariance, Metric
from eckart.registry import method


@method("cospadi", family="dictionary", paper="CoSpaDi: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning, Makhov et al., 2025, arXiv 2509.22075")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class CoSpaDi(Recipe):
    """Every output unit made of its own few atoms of a dictionary over inputs, by pursuit and K-SVD (section 3).

    The paper's columns are output units, which are rows here, so that codes are `row_sparse`. Departs from the paper:
    the bitmap of the codes is counted and nothing is taken from their mantissas to pay for it; the dictionary is the
    least-squares one for the final codes, so that the root of the covariance is never inverted for it. Dictionaries
    shared by several layers are not made.
    """

    form: Form = field(default_factory=Dictionary)
    metric: Metric = field(default_factory=InputCovariance)
