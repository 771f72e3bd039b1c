"""Pruning for a domain that keeps what is important in general."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from eckart.forms import Form, Sparse
from eckart.forms.dual import Dual
from eckart.jobs.recipe import Recipe
from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import psd_root
from eckart.metrics import Fisher, Metric, Statistics
from eckart.registry import method


@dataclass(frozen=True)
class FisherOfInputs(Fisher):
    """Fisher's weights of single errors, beside the covariance of inputs for solvers that move errors among columns.

    No word of the metrics' language stands for it.
    """

    word: ClassVar[str] = "fisher_of_inputs"
    needs: ClassVar[frozenset[str]] = frozenset({"fisher", "outer"})

    def weighting(self, statistics: Statistics, where: str = "") -> Weighting:
        C = statistics.mean("outer", where)
        return Weighting(right=psd_root(C, 1e-9, "eigen", where), each=super().weighting(statistics, where).each)


@method("d_pruner", family="sparse", paper="Pruning as a Domain-specific LLM Extractor, Zhang et al., NAACL Findings 2024, arXiv 2405.06275")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class DPruner(Recipe):
    """Keep the weights of the largest Taylor score, with a price on moving what SparseGPT finds important (section 3).

    Departs from the paper: gradients are those of the given model, as the root of their mean square over examples, and
    are not gathered along a fine-tuning; and both importances come from the same calibration data, so that text of the
    domain should be mixed with general text. `dual(blocks=32)` is the paper's iterative blocking.
    """

    form: Form = field(default_factory=lambda: Sparse(selection=Dual()))
    metric: Metric = field(default_factory=FisherOfInputs)
