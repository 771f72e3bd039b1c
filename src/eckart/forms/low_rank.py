"""Two thin factors: the form of Eckart and Young, and of most of the catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.forms.algebra import ProductMatrix
from eckart.forms.base import FORMS, Curve, Form, Shape, check_shape, spread
from eckart.forms.dense import Dense
from eckart.linalg.svd import singular_values, truncated_svd
from eckart.linalg.weighting import PLAIN, Weighting, weighted_lstsq_right

RUNGS = 16


@FORMS.word("low_rank")
@dataclass(frozen=True)
class LowRank(Form):
    """left (out, rank) @ right (rank, in), the best of that rank under any two-sided weighting.

    With A = Lᵀ W R = U S Vᵀ, the optimum is L⁻ᵀ U_r · U_rᵀ Lᵀ W (Eckart and Young, 1936, in the weighted norm), so
    the root of the input weight is never inverted and may be singular.

    Args:
        rank: None is decided by the budget.
        multiple: ranks that the budget may choose are multiples of this.
        factors: the form of both factors, closed. Where it is not `dense()`, the left one is fitted first and the
            right one to what is then best beside it.
    """

    rank: int | None = None
    multiple: int = 1
    factors: Form = field(default_factory=Dense)

    def __post_init__(self) -> None:
        for name in ("rank", "multiple"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"low_rank({name}={value!r}): the {name} is a positive integer")
        if not isinstance(self.factors, Form):
            raise ValueError(f"low_rank(factors={self.factors!r}): that is no form")
        if self.factors.open:
            raise ValueError(f"low_rank(factors={self.factors}): give the factors all their settings; only the rank is left to the budget")  # fmt: skip # noqa: E501

    @property
    def open(self) -> bool:
        return self.rank is None

    @property
    def _plain(self) -> bool:
        """Whether the factors are stored as they are."""
        return self.factors == Dense()

    def at(self, rank: int) -> LowRank:
        return replace(self, rank=rank)

    def ranks(self, shape: Shape) -> Sequence[int]:
        """The ranks that a budget chooses among: those that cost less than the dense matrix, or some of all."""
        out, in_ = shape
        if not self._plain:
            return [self.multiple * r for r in spread(1, min(shape) // self.multiple, RUNGS)]
        most = (out * in_ - 1) // max(1, out + in_)
        return range(self.multiple, min(most, *shape) + 1, self.multiple)

    def ladder(self, shape: Shape) -> list[Form]:
        return [self.at(r) for r in self.ranks(shape)] if self.open else [self]

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> ProductMatrix:
        check_shape(shape, self)
        rank = self._rank(shape)
        left = self.factors.build((shape[0], rank), dtype=dtype, device=device)
        return ProductMatrix(left, self.factors.build((rank, shape[1]), dtype=dtype, device=device), self)

    def nbytes(self, shape: Shape, dtype: torch.dtype) -> int:
        if not self._plain:
            return super().nbytes(shape, dtype)
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
        W = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        return self._from(self._basis(W, self._rank((W.shape[0], W.shape[1])), weighting), matrix, weighting, dtype)

    def _basis(self, W: Float[Tensor, "out in"], rank: int, weighting: Weighting) -> Float[Tensor, "a r"]:
        """The leading left singular vectors of Lᵀ W R."""
        # weighted spectra fall so far that float32 would be tried in vain
        purpose: Literal["factors", "spectrum"] = "factors" if weighting is PLAIN else "spectrum"
        return truncated_svd(weighting.apply(W), rank, purpose=purpose).U

    def _from(
        self, U: Float[Tensor, "a r"], matrix: Float[Tensor, "out in"], weighting: Weighting, dtype: torch.dtype | None
    ) -> ProductMatrix:
        """The module whose columns span L⁻ᵀ U, up to what the form of its factors loses."""
        W = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        X, Y = balance(weighting.unapply_left(U), U.T @ weighting.left.times(W.T).T)
        if self._plain:
            return ProductMatrix(
                Dense().fit(X.to(matrix.dtype), dtype=dtype), Dense().fit(Y.to(matrix.dtype), dtype=dtype), self
            )
        dtype = dtype or matrix.dtype
        left = self.factors.fit(X, weighting.through_right(Y), dtype=dtype)
        X = left.dense().detach().to(W.dtype)
        Y = weighted_lstsq_right(X, W, weighting, Y, torch.finfo(dtype).eps ** 0.5).to(W.dtype)
        return ProductMatrix(left, self.factors.fit(Y, weighting.through_left(X), dtype=dtype), self)

    @property
    def fits_rungs(self) -> bool:
        return self.open and not self._plain

    def curve(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting, dtype: torch.dtype, energy: float | None = None
    ) -> Curve:
        """The whole ladder from one spectrum: the error of rank r is the sum of the discarded squares.

        Where the factors are not dense, every rung is fitted, from one basis.
        """
        if not self.open:
            return super().curve(matrix, weighting, dtype, energy)
        W = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        out, in_ = matrix.shape
        ranks = self.ranks((out, in_))
        if not self._plain:
            return self._fitted_curve(ranks, matrix, weighting, dtype, energy)
        values = singular_values(weighting.apply(W)).double()
        tails = torch.cat([values.square().flip(0).cumsum(0).flip(0), values.new_zeros(1)])
        return Curve(
            forms=[self.at(r) for r in ranks],
            nbytes=[r * (out + in_) * dtype.itemsize for r in ranks],
            errors=[float(tails[min(r, len(values))]) for r in ranks],
            energy=float(tails[0]) if energy is None else energy,
            spectrum=values,
        )

    def _fitted_curve(
        self, ranks: Sequence[int], matrix: Float[Tensor, "out in"], weighting: Weighting, dtype: torch.dtype,
        energy: float | None,
    ) -> Curve:  # fmt: skip
        out, in_ = matrix.shape
        dense = out * in_ * dtype.itemsize
        forms = [f for f in map(self.at, ranks) if f.nbytes((out, in_), dtype) < dense]
        most = max((f.rank or 0 for f in forms), default=0)
        W = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        U = self._basis(W, most, weighting) if most else W[:, :0]
        fits = (f._from(U[:, : f.rank], matrix, weighting, dtype).dense().detach() for f in forms)
        points = [
            (f.nbytes((out, in_), dtype), weighting.norm2(matrix - m), f) for f, m in zip(forms, fits, strict=True)
        ]
        return Curve.of(points, weighting.norm2(matrix) if energy is None else energy)


def balance(left: Float[Tensor, "out r"], right: Float[Tensor, "r in"]) -> tuple[Tensor, Tensor]:
    """Scale each pair of column and row to equal norms, so that both survive storage in half precision."""
    a, b = left.norm(dim=0), right.norm(dim=1)
    scale = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-30)).sqrt(), torch.ones_like(a))
    return left * scale, right / scale[:, None]
