"""A matrix with entries on its main diagonal only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from eckart.forms.base import FORMS, Factored, Form, Shape, check_shape, empty, stored
from eckart.linalg.weighting import PLAIN, Weighting


class DiagonalMatrix(Factored):
    """`diagonal` (min(out, in),); the rest of an oblong shape is zero."""

    def __init__(self, diagonal: Tensor, shape: Shape, form: Diagonal):
        super().__init__()
        self.diagonal, self.shape, self.form = diagonal, shape, form

    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        k = self.diagonal.shape[0]
        y = F.pad(x[..., :k] * self.diagonal, (0, self.shape[0] - k))
        return y if bias is None else y + bias

    def dense(self) -> Float[Tensor, "out in"]:
        out, in_ = self.shape
        k = self.diagonal.shape[0]
        return F.pad(torch.diag(self.diagonal), (0, in_ - k, 0, out - k))

    def flops(self, tokens: int) -> int:
        return tokens * self.diagonal.shape[0]


@FORMS.word("diagonal")
@dataclass(frozen=True)
class Diagonal(Form):
    """diag(d). As a factor of a product it is square."""

    def inner(self, out: int | None = None, in_: int | None = None) -> int | None:
        return out if out is not None else in_

    def ladder(self, shape: Shape) -> list[Form]:
        return [self]

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> DiagonalMatrix:
        check_shape(shape, self)
        return DiagonalMatrix(empty(min(shape), dtype=dtype, device=device), shape, self)

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> DiagonalMatrix:
        """Solves (G ∘ C) d = diag(G W C), the normal equations of || Lᵀ (W - diag(d)) R ||."""
        out, in_ = matrix.shape
        k = min(out, in_)
        G, C = weighting.left.gram(out), weighting.right.gram(in_)
        rhs = (G.to(matrix.device) @ matrix.double() @ C.to(matrix.device)).diagonal()[:k]
        lhs = (G[:k, :k] * C[:k, :k]).to(matrix.device)
        # lstsq would start from uninitialised pivots, and solve a singular system differently from run to run
        d = torch.linalg.pinv(lhs, hermitian=True) @ rhs
        return DiagonalMatrix(stored(d.to(matrix.dtype), dtype), (out, in_), self)
