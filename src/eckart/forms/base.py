"""What every form owes: the two base classes `Form` (an expression without numbers) and `Factored` (the numbers)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from eckart.forms.language import Vocabulary
from eckart.linalg.weighting import PLAIN, Weighting

Shape = tuple[int, int]
FORMS: Vocabulary[Form] = Vocabulary("form")


class Factored(nn.Module, ABC):
    """A matrix (out, in) held as an expression of cheap ones. Floating point factors are trainable parameters.

    Attributes:
        shape: (out, in).
        form: the closed form that describes it; `form.build(shape)` makes an empty module of the same layout.
    """

    shape: Shape
    form: Form

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        """x Wᵀ + bias."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix itself, formed."""

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """Multiply-adds, counted twice, of a forward pass over `tokens` rows."""

    def rows(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        """Rows of the matrix, as an embedding looks them up."""
        return self.dense()[ids]

    def portable(self) -> Factored:
        """The same matrix as other runtimes can read it, perhaps in more bytes; mostly itself."""
        return self

    @property
    def exact(self) -> bool:
        """Whether `forward` multiplies by `dense()`, and no part of it rounds its input first."""
        return all(m.exact for m in self.modules() if m is not self and isinstance(m, Factored))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    def extra_repr(self) -> str:
        return f"{self.form}, shape={self.shape}"


class DecodedMatrix(Factored):
    """A matrix stored as something else than numbers, whose rows are made when they are wanted and never kept."""

    @abstractmethod
    def decoded(self, rows: slice | Int[Tensor, " rows"]) -> Float[Tensor, "rows in"]:
        """Some rows of the matrix."""

    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        return F.linear(x, self.dense(), bias)

    def dense(self) -> Float[Tensor, "out in"]:
        return self.decoded(slice(None))

    def rows(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        return self.decoded(ids.reshape(-1)).view(*ids.shape, self.shape[1])

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Curve:
    """What a matrix costs and loses at each setting of a form's dials, cheapest first.

    Attributes:
        forms: the closed forms.
        nbytes: stored bytes of each.
        errors: squared error of each in the metric, same units as `energy`.
        energy: squared norm of the whole matrix in the metric.
        spectrum: all singular values of the weighted matrix, where the form truncates a spectrum.
    """

    forms: Sequence[Form]
    nbytes: Sequence[int]
    errors: Sequence[float]
    energy: float
    spectrum: Tensor | None = None

    def __len__(self) -> int:
        return len(self.forms)

    @classmethod
    def of(cls, points: Iterable[tuple[int, float, Form]], energy: float, spectrum: Tensor | None = None) -> Curve:
        """From (bytes, error, form) in any order."""
        ordered = sorted(points, key=lambda p: p[:2])
        return cls([f for *_, f in ordered], [n for n, *_ in ordered], [e for _, e, _ in ordered], energy, spectrum)

    def only(self, points: Sequence[int]) -> Curve:
        """These points, in this order."""
        forms, nbytes = [self.forms[i] for i in points], [self.nbytes[i] for i in points]
        return replace(self, forms=forms, nbytes=nbytes, errors=[self.errors[i] for i in points])

    @cached_property
    def by_cost(self) -> tuple[list[int], list[int]]:
        """The points by bytes, of equally dear ones the best last; and those bytes."""
        order = sorted(range(len(self)), key=lambda i: (self.nbytes[i], -self.errors[i], -i))
        return order, [self.nbytes[i] for i in order]


@dataclass(frozen=True)
class Form(ABC):
    """What an expression looks like, with no numbers in it: hashable, printable, parsed back by `parse`.

    A dial that is `None` is open: a budget sets it.
    """

    def __str__(self) -> str:
        return FORMS.print(self)

    def __add__(self, other: Form) -> Form:
        from eckart.forms.algebra import Sum
        from eckart.forms.one_of import each

        return each(lambda a, b: Sum((a, b)), self, other) if isinstance(other, Form) else NotImplemented

    def __matmul__(self, other: Form) -> Form:
        from eckart.forms.algebra import Product
        from eckart.forms.one_of import each

        return each(Product, self, other) if isinstance(other, Form) else NotImplemented

    def __or__(self, other: Form) -> Form:
        from eckart.forms.one_of import OneOf

        return OneOf((self, other)) if isinstance(other, Form) else NotImplemented

    @property
    def open(self) -> bool:
        """Whether some dial is left to the budget."""
        return False

    @abstractmethod
    def ladder(self, shape: Shape) -> list[Form]:
        """Closed forms from cheapest to dearest; a closed form is its own only rung."""

    @abstractmethod
    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> Factored:
        """An empty module of this form. Raises `ValueError` where the form does not fit the shape."""

    @abstractmethod
    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> Factored:
        """The module of this form with the least || Lᵀ (matrix - module) R ||, its numbers stored as `dtype`."""

    def approximation(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting, dtype: torch.dtype
    ) -> Float[Tensor, "out in"]:
        """What the fit stands for, where its module is not wanted."""
        return self.fit(matrix, weighting, dtype=dtype).dense().detach()

    def nbytes(self, shape: Shape, dtype: torch.dtype) -> int:
        """Bytes that `build(shape, dtype=dtype)` stores."""
        return self.build(shape, dtype=dtype, device="meta").nbytes

    def inner(self, out: int | None = None, in_: int | None = None) -> int | None:
        """Width of the free side when this is a factor of a product with the other side given; None if it is free."""
        return None

    @property
    def fits_rungs(self) -> bool:
        """Whether `curve` fits several rungs, so that a rung which is chosen by its bytes alone comes cheaper."""
        return self.open

    def curve(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting, dtype: torch.dtype, energy: float | None = None
    ) -> Curve:
        """Cost and error at every rung of the ladder that costs less than the dense matrix, by fitting each."""
        out, in_ = shape = (matrix.shape[0], matrix.shape[1])
        costs = [(form.nbytes(shape, dtype), form) for form in self.ladder(shape)]
        points = [
            (nbytes, weighting.norm2(matrix - form.approximation(matrix, weighting, dtype)), form)
            for nbytes, form in costs
            if nbytes < out * in_ * dtype.itemsize
        ]
        return Curve.of(points, weighting.norm2(matrix) if energy is None else energy)


def parse(text: str) -> Form:
    """The form that `text` describes, such as `low_rank(rank=32) + diagonal()`."""
    return FORMS.parse(text)


def as_form(form: Form | str) -> Form:
    """A form, from itself or from its text."""
    return form if isinstance(form, Form) else parse(form)


def check_shape(shape: Shape, what: Form) -> None:
    """Refuse shapes that no matrix has: a checkpoint's word is not trusted."""
    out, in_ = shape
    if out < 0 or in_ < 0 or out * in_ > 2**40:
        raise ValueError(f"{what} cannot have shape {shape}")


def spread(low: int, high: int, count: int) -> list[int]:
    """At most `count` different integers from low to high, evenly spread in logarithm, both ends included."""
    if high <= low:
        return [high] if high >= 1 else []
    steps = [low * (high / low) ** (i / (count - 1)) for i in range(count)]
    return sorted({min(high, max(low, math.floor(s + 0.5))) for s in steps})


def stored(t: Tensor, dtype: torch.dtype | None) -> nn.Parameter:
    """A parameter that keeps t at the storage dtype."""
    return nn.Parameter(t.to(dtype or t.dtype).contiguous().clone())


def empty(*size: int, dtype: torch.dtype | None, device: str | None) -> nn.Parameter:
    """A parameter without values."""
    return nn.Parameter(torch.empty(*size, dtype=dtype, device=device))
