"""Small groups with quantised scales, and the weights that rounding would hurt most kept exact."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.forms import Form, Quantized, Sparse
from eckart.forms.gptq import GPTQ
from eckart.forms.grids import Uniform
from eckart.forms.with_outliers import WithOutliers
from eckart.jobs.recipe import Recipe
from eckart.metrics import InputCovariance, Metric
from eckart.registry import method

REAL = Uniform(zero="real")


@method("spqr", family="quantised", paper="SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression, Dettmers et al., ICLR 2024, arXiv 2306.03078")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class SpQR(Recipe):
    """GPTQ in groups of 16 whose scales and offsets are 3-bit codes in groups of 16 rows, and 1% of weights exact.

    A weight stays exact where its squared error, in units of what feedback leaves of it, is above a threshold; before,
    weights that stretch their group's range by so much that the error falls by more than the threshold without them
    are left out of it (algorithm 1).

    Departs from the paper: the density is given and the threshold follows, where the paper's threshold gives a density;
    grids are those of the original weights (static groups), so that no permutation is stored; the slot of an outlier
    holds the nearest code, and the sparse part the difference.
    """

    form: Form = field(
        default_factory=lambda: WithOutliers(
            Quantized(group=16, grid=REAL, rounding=GPTQ(), scales=Quantized(bits=3, group=16, grid=REAL)),
            Sparse(density=0.01),
        )
    )
    metric: Metric = field(default_factory=InputCovariance)
    one_shot: bool = False
