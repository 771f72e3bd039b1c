"""A compressed matrix and the low rank that repairs its outputs best."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.allocation import Allocator, Optimal
from eckart.compression.compensated import WithLowRank
from eckart.forms import Form, Quantized
from eckart.forms.gptq import GPTQ
from eckart.metrics import InputCovariance, Metric
from eckart.registry import method


@method("eora", family="mixture", paper="EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation, Liu et al., 2024, arXiv 2410.21271")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class EoRA(WithLowRank):
    """Any compressed matrix, plus the rank r nearest to W - Ŵ in the norm of the layer's outputs (section 3.2).

    With C = Q Λ Qᵀ the second moment of the inputs, the paper truncates (W - Ŵ) Q Λ^½; the error left is the tail of
    that spectrum whatever root of C is taken, and no root is inverted here. Blocks are repaired in order, on inputs
    that the compressed and repaired blocks before put out.

    Departs from the paper: the budget chooses the bits of the compressed part (`form` may close them, or be any other
    form), C is damped by 1e-6 of its mean diagonal, and the low rank's bytes count.

    Args:
        form: the compressor.
        rank: of the repair.
    """

    form: Form = field(default_factory=lambda: Quantized(group=128, rounding=GPTQ()))
    metric: Metric = field(default_factory=InputCovariance)
    allocation: Allocator = field(default_factory=Optimal)
    one_shot: bool = False
    rank: int = 128
