"""Alternatives: `a | b` is whichever of the two the budget is better spent on, weight by weight.

They stand outside sums and products: `(a | b) + c` is `a + c | b + c`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.forms.base import Curve, Factored, Form, Shape
from eckart.linalg.weighting import PLAIN, Weighting


@dataclass(frozen=True)
class OneOf(Form):
    """One of several forms, left to the budget. Its ladder is all of theirs; it is never fitted itself."""

    forms: tuple[Form, ...]

    def __post_init__(self) -> None:
        flat = itertools.chain.from_iterable(f.forms if isinstance(f, OneOf) else (f,) for f in self.forms)
        object.__setattr__(self, "forms", tuple(dict.fromkeys(flat)))

    def __str__(self) -> str:
        return " | ".join(str(f) for f in self.forms)

    @property
    def open(self) -> bool:
        return True

    def ladder(self, shape: Shape) -> list[Form]:
        return [rung for form in self.forms for rung in form.ladder(shape)]

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> Factored:
        raise ValueError(f"{self}: alternatives are decided by a budget, for each weight; name one of them to fit it")

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> Factored:
        return self.build((matrix.shape[0], matrix.shape[1]))

    @property
    def fits_rungs(self) -> bool:
        return False  # errors decide which of two alternatives is worth its bytes

    def curve(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting, dtype: torch.dtype, energy: float | None = None
    ) -> Curve:
        """The curves of all, together; points that another one beats in both bytes and error are left out."""
        energy = weighting.norm2(matrix) if energy is None else energy
        curves = [form.curve(matrix, weighting, dtype, energy) for form in self.forms]
        points = [p for c in curves for p in zip(c.nbytes, c.errors, c.forms, strict=True)]
        kept: list[tuple[int, float, Form]] = []
        for point in sorted(points, key=lambda p: (p[0], p[1])):
            if not kept or point[1] < kept[-1][1]:
                kept.append(point)
        spectrum = next((c.spectrum for c in curves if c.spectrum is not None), None)
        return Curve.of(kept, energy, spectrum)


def each(combine: Callable[[Form, Form], Form], left: Form, right: Form) -> Form:
    """`combine` of two forms, or where one is a choice, of its every alternative."""
    lefts, rights = (f.forms if isinstance(f, OneOf) else (f,) for f in (left, right))
    combined = tuple(combine(a, b) for a in lefts for b in rights)
    return combined[0] if len(combined) == 1 else OneOf(combined)
