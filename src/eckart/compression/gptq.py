"""Rounding with error feedback under the covariance of the inputs."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.forms import Form, Quantized
from eckart.forms.gptq import GPTQ
from eckart.jobs.recipe import Recipe
from eckart.metrics import InputCovariance, Metric
from eckart.registry import method


@method("gptq", family="quantised", paper="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, Frantar et al., ICLR 2023, arXiv 2210.17323")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class GPTQMethod(Recipe):
    """Round column by column, and let the columns still to come make up for each one's error (algorithm 1).

    Departs from the paper: columns go by descending activation and the grids are those of the original weights, which
    the authors' code offers as act-order and static groups. Blocks are fitted one after the other, on what the
    compressed ones before put out; all layers of a block see the inputs that the block as it was gave them.
    """

    form: Form = field(default_factory=lambda: Quantized(rounding=GPTQ()))
    metric: Metric = field(default_factory=InputCovariance)
    one_shot: bool = False
