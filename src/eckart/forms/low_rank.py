"""Two thin factors: the form of Eckart and Young, and of most of the catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.forms.algebra import ProductMatrix
from eckart.forms.base import FORMS, Curve, Form, Shape, check_shape
from eckart.forms.dense import Dense
from eckart.linalg.svd import singular_values, truncated_svd
from eckart.linalg.weighting import PLAIN, Weighting


@FORMS.word("low_rank")
@dataclass(frozen=True)
class LowRank(Form):
    """left (out, rank) @ right (rank, in), the best of that rank under any two-sided weighting.

    With A = Lᵀ W R = U S Vᵀ, the optimum is L⁻ᵀ U_r · U_rᵀ Lᵀ W (Eckart and Young, 1936, in the weighted norm), so
    the root of the input weight is never inverted and may be singular.

    Args:
        rank: None is decided by the budget.
        multiple: ranks that the budget may choose are multiples of this.
    """

    rank: int | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        for name in ("rank", "multiple"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"low_rank({name}={value!r}): the {name} is a positive integer")

    @property
    def open(self) -> bool:
        return self.rank is None

    def at(self, rank: int) -> LowRank:
        return LowRank(rank, self.multiple)

    def ranks(self, shape: Shape) -> range:
        """The ranks that cost less than the dense matrix."""
        out, in_ = shape
        most = (out * in_ - 1) // max(1, out + in_)
        return range(self.multiple, min(most, *shape) + 1, self.multiple)

    def ladder(self, shape: Shape) -> list[Form]:
        return [self.at(r) for r in self.ranks(shape)] if self.open else [self]

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> ProductMatrix:
        check_shape(shape, self)
        rank = self._rank(shape)
        left = Dense().build((shape[0], rank), dtype=dtype, device=device)
        return ProductMatrix(left, Dense().build((rank, shape[1]), dtype=dtype, device=device), self)

    def nbytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return self._rank(shape) * (shape[0] + shape[1]) * dtype.itemsize

    def _rank(self, shape: Shape) -> int:
        if self.rank is None:
            raise ValueError("low_rank() has no rank yet: give one, or a budget that decides it")
        if self.rank > min(shape):
            raise ValueError(f"{self} does not fit a matrix of shape {shape}: the rank is at most {min(shape)}")
        return self.rank

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> ProductMatrix:
        rank = self._rank((matrix.shape[0], matrix.shape[1]))
        W = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        # weighted spectra fall so far that float32 would be tried in vain
        purpose: Literal["factors", "spectrum"] = "factors" if weighting is PLAIN else "spectrum"
        U = truncated_svd(weighting.apply(W), rank, purpose=purpose).U
        left, right = balance(weighting.unapply_left(U), U.T @ weighting.left.times(W.T).T)
        return ProductMatrix(
            Dense().fit(left.to(matrix.dtype), dtype=dtype), Dense().fit(right.to(matrix.dtype), dtype=dtype), self
        )

    def curve(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting, dtype: torch.dtype, energy: float | None = None
    ) -> Curve:
        """The whole ladder from one spectrum: the error of rank r is the sum of the discarded squares."""
        if not self.open:
            return super().curve(matrix, weighting, dtype, energy)
        out, in_ = matrix.shape
        values = singular_values(weighting.apply(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))).double()
        tails = torch.cat([values.square().flip(0).cumsum(0).flip(0), values.new_zeros(1)])
        ranks = self.ranks((out, in_))
        return Curve(
            forms=[self.at(r) for r in ranks],
            nbytes=[r * (out + in_) * dtype.itemsize for r in ranks],
            errors=[float(tails[min(r, len(values))]) for r in ranks],
            energy=float(tails[0]) if energy is None else energy,
            spectrum=values,
        )


def balance(left: Float[Tensor, "out r"], right: Float[Tensor, "r in"]) -> tuple[Tensor, Tensor]:
    """Scale each pair of column and row to equal norms, so that both survive storage in half precision."""
    a, b = left.norm(dim=0), right.norm(dim=1)
    scale = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-30)).sqrt(), torch.ones_like(a))
    return left * scale, right / scale[:, None]
