"""Integers and their scales, each chosen for the other."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.forms import Form, Quantized
from eckart.forms.alternate import Alternate
from eckart.forms.grids import Uniform
from eckart.jobs.recipe import Recipe
from eckart.metrics import InputCovariance, Metric
from eckart.registry import method


@method("decoupleq", family="quantised", paper="decoupleQ: Towards 2-bit Post-Training Uniform Quantization via decoupling Parameters into Integer and Floating Points, Guo et al., 2024, arXiv 2404.12759")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class DecoupleQ(Recipe):
    """Uniform grids with any real offset: integers by error feedback, scales and offsets in closed form, by turns.

    Departs from the paper: the search for a start looks at 40 ranges under the diagonal of the covariance, not at 160
    under all of it. Tuning scales, offsets and norms against the block's output is training, and left out.
    """

    form: Form = field(default_factory=lambda: Quantized(grid=Uniform(zero="real", search=40), rounding=Alternate()))
    metric: Metric = field(default_factory=InputCovariance)
    one_shot: bool = False
