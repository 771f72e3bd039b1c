"""Every weight to the nearest number of its group's grid."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.forms import Form, Quantized
from eckart.jobs.recipe import Recipe
from eckart.registry import method


@method("rtn", family="quantised", paper="A Survey of Quantization Methods for Efficient Neural Network Inference, Gholami et al., 2021, arXiv 2103.13630")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class RTN(Recipe):
    """Round to nearest on grids from the least to the largest weight of each group: needs no data, and is the baseline
    of all quantisers."""

    form: Form = field(default_factory=Quantized)
