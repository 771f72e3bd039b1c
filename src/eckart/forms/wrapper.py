"""What forms share that do something around one other form: its dials are theirs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.forms.base import Curve, Factored, Form, Shape
from eckart.linalg.weighting import PLAIN, Weighting


@dataclass(frozen=True)
class Wrapper(Form):
    """A form around the one in its field `inside`.

    A subclass says what the form within is fitted to (`within`) and what is made of its module (`around`).
    """

    inside: ClassVar[str] = "form"

    def __post_init__(self) -> None:
        if not isinstance(self.wrapped, Form):
            raise ValueError(f"{getattr(self, 'word', '')}({self.inside}={self.wrapped!r}): that is no form")

    @property
    def wrapped(self) -> Form:
        form: Form = getattr(self, self.inside)
        return form

    def of(self, form: Form) -> Self:
        """The same around another form."""
        return replace(self, **{self.inside: form})

    @abstractmethod
    def around(self, module: Factored) -> Factored:
        """The module of this form, from that of the form within."""

    def within(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting
    ) -> tuple[Float[Tensor, "out in"], Weighting]:
        """The matrix that the form within is fitted to, and in which norm: of errors as large as the whole's."""
        return matrix, weighting

    @property
    def open(self) -> bool:
        return self.wrapped.open

    def inner(self, out: int | None = None, in_: int | None = None) -> int | None:
        return self.wrapped.inner(out, in_)

    def ladder(self, shape: Shape) -> list[Form]:
        return [self.of(form) for form in self.wrapped.ladder(shape)]

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> Factored:
        return self.around(self.wrapped.build(shape, dtype=dtype, device=device))

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> Factored:
        return self.around(self.wrapped.fit(*self.within(matrix, weighting), dtype=dtype or matrix.dtype))

    @property
    def fits_rungs(self) -> bool:
        return self.wrapped.fits_rungs

    def curve(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting, dtype: torch.dtype, energy: float | None = None
    ) -> Curve:
        shape = (matrix.shape[0], matrix.shape[1])
        found = self.wrapped.curve(*self.within(matrix, weighting), dtype, energy)
        forms = [self.of(form) for form in found.forms]
        return replace(found, forms=forms, nbytes=[form.nbytes(shape, dtype) for form in forms])
