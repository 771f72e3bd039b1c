"""Groups of weights on the pyramid lattice, an implicit codebook."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.forms import Form
from eckart.forms.pyramid import Pyramid
from eckart.forms.rotated import Rotated
from eckart.jobs.recipe import Recipe
from eckart.metrics import InputCovariance, Metric
from eckart.registry import method


@method("pvq", family="quantised", paper="Pyramid Vector Quantization for LLMs, van der Ouderaa et al., 2024, arXiv 2410.16926")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class PVQ(Recipe):
    """Directions of groups by their number on the pyramid lattice, lengths by the law of random rows.

    Weights are rotated first, inputs with them, so that rows with heavy tails become such as the law wants them.

    Departs from the paper: rotations are of inputs alone and done where a layer meets them, not merged into layers
    before; a group's points are numbered in 62 bits, which bounds its size; activations are not quantised, for which
    there is `rotated(quantized_inputs(matrix=pyramid()))`.
    """

    form: Form = field(default_factory=lambda: Rotated(Pyramid()))
    metric: Metric = field(default_factory=InputCovariance)
    one_shot: bool = False
