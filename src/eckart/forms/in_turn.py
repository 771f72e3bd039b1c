"""Sums whose terms are fitted in a given order, a given number of times: compensation, and alternation."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.forms.algebra import RUNGS_OF_A_SUM, SumMatrix, descend, thin
from eckart.forms.base import FORMS, Curve, Form, Shape
from eckart.forms.low_rank import LowRank
from eckart.forms.quantized import Quantized
from eckart.linalg.weighting import PLAIN, Weighting

CURVE_SWEEPS = 4


@FORMS.word("in_turn")
@dataclass(frozen=True)
class InTurn(Form):
    """first + second, each fitted on what the other leaves, in that order and at most `sweeps` times.

    A plain sum begins with the better single term and goes on until nothing is gained. Here one sweep is what EoRA
    does, the second term repairing the first; more are LQ-LoRA's alternation. It ends early where a sweep gains
    little, and of all sweeps the best one counts.

    Args:
        first: fitted first, on the whole matrix.
        second: fitted on what the first leaves.
        sweeps: how often both are fitted, at most.
    """

    first: Form = field(default_factory=Quantized)
    second: Form = field(default_factory=LowRank)
    sweeps: int = 1

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            if not isinstance(getattr(self, name), Form):
                raise ValueError(f"in_turn({name}={getattr(self, name)!r}): that is no form")
        if not isinstance(self.sweeps, int) or self.sweeps < 1:
            raise ValueError(f"in_turn(sweeps={self.sweeps!r}): the number of sweeps is a positive integer")

    @property
    def terms(self) -> tuple[Form, Form]:
        return (self.first, self.second)

    @property
    def open(self) -> bool:
        return self.first.open or self.second.open

    def ladder(self, shape: Shape) -> list[Form]:
        per_term = max(2, round(RUNGS_OF_A_SUM ** (1 / max(1, self.first.open + self.second.open))))
        rungs = [thin(t.ladder(shape), per_term) for t in self.terms]
        return [InTurn(first, second, self.sweeps) for first, second in itertools.product(*rungs)]

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> SumMatrix:
        return SumMatrix([t.build(shape, dtype=dtype, device=device) for t in self.terms], self)

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> SumMatrix:
        return SumMatrix(descend(self.terms, (0, 1), matrix, weighting, dtype, self.sweeps), self)

    def curve(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting, dtype: torch.dtype, energy: float | None = None
    ) -> Curve:
        """Cost and error at every rung below the dense matrix. In one sweep, all rungs of the second term come from
        its own curve on what a rung of the first one leaves, which for low ranks is one spectrum. Of more sweeps few
        are done for a curve, so that errors are somewhat above those of the fits, which go on longer."""
        shape = (matrix.shape[0], matrix.shape[1])
        energy = weighting.norm2(matrix) if energy is None else energy
        dense = matrix.numel() * dtype.itemsize
        if self.sweeps > CURVE_SWEEPS:
            quick = replace(self, sweeps=CURVE_SWEEPS).curve(matrix, weighting, dtype, energy)
            return replace(quick, forms=[replace(f, sweeps=self.sweeps) for f in quick.forms if isinstance(f, InTurn)])
        if self.sweeps > 1 or not self.second.open:
            return super().curve(matrix, weighting, dtype, energy)
        points: list[tuple[int, float, Form]] = []
        for first in self.first.ladder(shape):
            spent = first.nbytes(shape, dtype)
            if spent < dense:
                rest = matrix - first.fit(matrix, weighting, dtype=dtype).dense().detach().to(matrix.dtype)
                added = self.second.curve(rest, weighting, dtype)
                points += [
                    (spent + n, e, InTurn(first, second, 1))
                    for n, e, second in zip(added.nbytes, added.errors, added.forms, strict=True)
                ]
        return Curve.of([p for p in points if p[0] < dense], energy)
