"""Keeping some coordinates: a matrix of zeros and ones that puts a short vector into a long one, or takes it out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from eckart.forms.base import FORMS, Factored, Form, Shape, check_shape
from eckart.linalg.weighting import PLAIN, Weighting


class SelectMatrix(Factored):
    """`index` (width,), ascending: row index[j] of column j holds the one if tall (it scatters), else the transpose.

    A square one is the identity.
    """

    index: Tensor
    like: Tensor

    def __init__(self, index: Int[Tensor, " width"], shape: Shape, form: Select, dtype: torch.dtype | None = None):
        super().__init__()
        self.register_buffer("index", index.to(torch.int32))
        # nothing else here has a floating point dtype, and `dense` must answer in the model's
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=index.device), persistent=False)
        self.shape, self.form = shape, form

    @property
    def scatters(self) -> bool:
        """Whether the kept coordinates are those of the output."""
        return self.shape[0] >= self.shape[1]

    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        index = self.index.long()
        if self.scatters:
            y = x.new_zeros(*x.shape[:-1], self.shape[0]).index_copy(-1, index, x)
        else:
            y = x.gather(-1, index.expand(*x.shape[:-1], -1))
        return y if bias is None else y + bias

    def dense(self) -> Float[Tensor, "out in"]:
        ones = F.one_hot(self.index.long(), max(self.shape)).to(self.like.dtype)
        return ones.T if self.scatters else ones

    def rows(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        if self.scatters:
            return (ids[..., None] == self.index).to(self.like.dtype)
        return F.one_hot(self.index.long()[ids], self.shape[1]).to(self.like.dtype)

    def flops(self, tokens: int) -> int:
        return 0


@FORMS.word("select")
@dataclass(frozen=True)
class Select(Form):
    """`width` of a matrix's coordinates, ascending: any other order is the other factor's business.

    `select() @ dense()` is a matrix of which some rows are kept and the others are zero; `dense() @ select()` keeps
    columns. The places are stored as int32, the multiplication by them costs a copy.

    Args:
        width: columns when it stands left, rows when it stands right; None is decided by the other factor or the
            budget.
    """

    width: int | None = None

    def __post_init__(self) -> None:
        if self.width is not None and (not isinstance(self.width, int) or self.width < 1):
            raise ValueError(f"select(width={self.width!r}): the width is a positive integer")

    def inner(self, out: int | None = None, in_: int | None = None) -> int | None:
        return self.width

    def ladder(self, shape: Shape) -> list[Form]:
        return [self]

    def _width(self, shape: Shape) -> int:
        check_shape(shape, self)
        if self.width not in (None, min(shape)):
            raise ValueError(f"{self} does not fit a matrix of shape {shape}: one side of it is the width, the other no shorter")  # fmt: skip # noqa: E501
        return min(shape)

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> SelectMatrix:
        index = torch.arange(self._width(shape), dtype=torch.int32, device=device)
        return SelectMatrix(index, shape, self, dtype)

    def at(self, index: Int[Tensor, " width"], shape: Shape, dtype: torch.dtype | None = None) -> SelectMatrix:
        """The module that keeps the coordinates `index` (ascending)."""
        width = self._width(shape)
        inside = len(index) == width and bool((index[1:] > index[:-1]).all())
        if not inside or (width and not (index[0] >= 0 and index[-1] < max(shape))):
            raise ValueError(f"{self} of shape {shape} needs {width} ascending coordinates below {max(shape)}")
        return SelectMatrix(index, shape, self, dtype)

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> SelectMatrix:
        """The coordinates that carry most of the matrix in the weighted norm; earlier ones where they tie.

        In a product these are the rows (columns) whose loss costs most if the other factor is free, as it is there.
        """
        out, in_ = matrix.shape
        tall = out >= in_
        across, along = (weighting.right, weighting.left) if tall else (weighting.left, weighting.right)
        M = matrix.double() if tall else matrix.double().T
        carried = across.times(M).square().sum(1) * along.gram(M.shape[0]).diagonal().to(M.device)
        index = carried.sort(descending=True, stable=True).indices[: self._width((out, in_))].sort().values
        return self.at(index, (out, in_), dtype or matrix.dtype)
