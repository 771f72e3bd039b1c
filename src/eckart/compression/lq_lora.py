"""Low rank plus quantised, alternating, every matrix with a quantiser of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.allocation import Allocator
from eckart.allocation.integer_program import IntegerProgram
from eckart.compression.compensated import WithLowRank
from eckart.forms import Form, LowRank, OneOf, parse
from eckart.forms.in_turn import InTurn
from eckart.metrics import Metric, Plain
from eckart.registry import method


def configurations(groups: tuple[int, ...] = (16, 32, 64)) -> Form:
    """NormalFloat at every width and these groups, the scales of 256 groups quantised together to 8 bits."""
    scales = "quantized(bits=8, group=256)"
    return OneOf(tuple(parse(f"quantized(group={g}, grid=normal_float(), scales={scales})") for g in groups))


@method("lq_lora", family="mixture", paper="LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition, Guo et al., ICLR 2024, arXiv 2311.12023")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class LQLoRA(WithLowRank):
    """W ≈ L₁L₂ + Q by alternation (algorithm 1), and an integer programme over the quantisers of all matrices (eq. 3).

    L₁L₂ is the best low rank of what Q leaves (under a Fisher metric the two-sided heuristic of section 3.3), Q the
    rounding of what L₁L₂ leaves; it stops where the error no longer falls.

    Departs from the paper: the best iterate is kept and not the last, and a sweep that gains less than 1e-4 ends it;
    the low rank's bytes count in the budget; scales are quantised between their least and largest, 8 bits and 256
    groups together, which leaves 18 configurations of the paper's 432 (`form` may name others). The Fisher-weighted
    variant is a `metric` of squared gradients; fine-tuning the low rank is a training job of its own.

    Args:
        form: the quantisers to choose among.
        rank: of the low-rank part.
        sweeps: alternations, at most.
    """

    form: Form = field(default_factory=configurations)
    metric: Metric = field(default_factory=Plain)
    allocation: Allocator = field(default_factory=lambda: IntegerProgram(damage="error"))
    rank: int = 64
    sweeps: int = 100

    def beside(self, compressed: Form, low: LowRank) -> Form:
        return InTurn(low, compressed, self.sweeps)
