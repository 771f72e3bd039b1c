"""The full matrix, kept as it is: the leaf that other forms are made of, and what a layer is when nothing pays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from eckart.forms.base import FORMS, Factored, Form, Shape, check_shape, empty, spread, stored
from eckart.linalg.weighting import PLAIN, Weighting


class DenseMatrix(Factored):
    """`weight` (out, in)."""

    def __init__(self, weight: Tensor, form: Dense):
        super().__init__()
        self.weight, self.form = weight, form
        self.shape = (weight.shape[0], weight.shape[1])

    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        return F.linear(x, self.weight, bias)

    def dense(self) -> Float[Tensor, "out in"]:
        return self.weight

    def rows(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        return F.embedding(ids, self.weight)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.shape[0] * self.shape[1]


@FORMS.word("dense")
@dataclass(frozen=True)
class Dense(Form):
    """A full matrix. As a factor of a product, `width` is the side that the product's shape leaves open.

    Args:
        width: columns when it stands left, rows when it stands right; None is decided by the other factor or the
            budget.
    """

    width: int | None = None

    def __post_init__(self) -> None:
        if self.width is not None and (not isinstance(self.width, int) or self.width < 1):
            raise ValueError(f"dense(width={self.width!r}): the width is a positive integer")

    def inner(self, out: int | None = None, in_: int | None = None) -> int | None:
        return self.width

    def ladder(self, shape: Shape) -> list[Form]:
        return [self]

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> DenseMatrix:
        check_shape(shape, self)
        return DenseMatrix(empty(*shape, dtype=dtype, device=device), self)

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> DenseMatrix:
        return DenseMatrix(stored(matrix, dtype), self)


def widths(shape: Shape, count: int = 12) -> list[int]:
    """Inner widths of a product of two dense factors from one that keeps a sixteenth up to break-even."""
    out, in_ = shape
    most = max(1, out * in_ // max(1, out + in_))
    return spread(max(1, most // 16), most, count)
