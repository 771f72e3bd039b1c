"""A dictionary and sparse codes: every row of the matrix made of a few of the atoms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.forms.algebra import ProductMatrix
from eckart.forms.base import FORMS, Curve, Form, Shape, check_shape
from eckart.forms.column_sparse import RowSparse
from eckart.forms.dense import Dense
from eckart.forms.low_rank import balance
from eckart.forms.sparse import sampled_curve
from eckart.linalg.sparse_coding import learn_dictionary
from eckart.linalg.weighting import PLAIN, Weighting, weighted_lstsq_right
from eckart.linalg.whitening import gram_diagonal

ANCHORS, ANCHOR_ITERATIONS, RUNGS = 4, 4, 40


class Coded(Form):
    """What forms with sparse codes share: few rungs are fitted, by few iterations, and the others lie between."""

    iterations: int

    def curve(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting, dtype: torch.dtype, energy: float | None = None
    ) -> Curve:
        """Errors somewhat above those of the fits, which iterate longer."""

        def error(form: Form) -> float:
            assert isinstance(form, Coded)
            quick = replace(form, iterations=min(ANCHOR_ITERATIONS, form.iterations))  # type: ignore[call-arg]
            return weighting.norm2(matrix - quick.fit(matrix, weighting, dtype=dtype).dense().detach().to(matrix.dtype))

        energy = weighting.norm2(matrix) if energy is None else energy
        return sampled_curve(self.ladder((matrix.shape[0], matrix.shape[1])), matrix, dtype, energy, ANCHORS, error)


@FORMS.word("dictionary")
@dataclass(frozen=True)
class Dictionary(Coded):
    """row_sparse (out, atoms) @ dense (atoms, in), by K-SVD in the norm of the layer's output (CoSpaDi, 2509.22075).

    With A = W R, R Rᵀ the weight on inputs, || (W - X D) R || = || A - X D' || for D = D' R⁻¹: ordinary dictionary
    learning of the rows of A. At last D is the least-squares one for X, in which R drops out. Of a weight on outputs
    the diagonal is used, as the code of a row is its own affair.

    Args:
        atoms: rows of the dictionary, at most those of the matrix; None is decided by the budget.
        ratio: atoms for every entry of a code; a row has floor(atoms / ratio) entries, at least one.
        iterations: of pursuit and K-SVD, at most.
        power_steps: of the rank-one fit of an atom.
        seed: which rows the atoms start from.
    """

    atoms: int | None = None
    ratio: float = 2.0
    iterations: int = 60
    power_steps: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(self.atoms, "atoms", "dictionary", optional=True)
        check_positive(self.iterations, "iterations", "dictionary")
        check_positive(self.power_steps, "power_steps", "dictionary")
        if not isinstance(self.ratio, int | float) or not 1 <= self.ratio < float("inf"):
            raise ValueError(f"dictionary(ratio={self.ratio!r}): a code has no more entries than there are atoms: the ratio is at least 1")  # fmt: skip # noqa: E501

    @property
    def open(self) -> bool:
        return self.atoms is None

    @property
    def nonzeros(self) -> int:
        """Entries of a row's code."""
        return max(1, int((self.atoms or 0) / self.ratio))

    def ladder(self, shape: Shape) -> list[Form]:
        if not self.open:
            return [self]
        out, in_ = shape
        most = min(out, int(out * in_ / (in_ + out / self.ratio)))
        some = {max(1, round(most * i / RUNGS)) for i in range(1, RUNGS + 1)} if most else set()
        return [closed for k in sorted(some) if _codes_fit(closed := replace(self, atoms=k), shape)]

    def _atoms(self, shape: Shape) -> int:
        if self.atoms is None:
            raise ValueError(f"{self} has no number of atoms yet: give it, or a budget that decides it")
        if self.atoms > shape[0]:
            raise ValueError(f"{self} does not fit a matrix of shape {shape}: there are at most {shape[0]} atoms")
        if not _codes_fit(self, shape):
            raise ValueError(f"{self} does not fit a matrix of shape {shape}: {self.nonzeros} entries in a code are more than {shape[1]} columns")  # fmt: skip # noqa: E501
        return self.atoms

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> ProductMatrix:
        check_shape(shape, self)
        atoms = self._atoms(shape)
        codes = RowSparse(self.nonzeros).build((shape[0], atoms), dtype=dtype, device=device)
        return ProductMatrix(codes, Dense().build((atoms, shape[1]), dtype=dtype, device=device), self)

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> ProductMatrix:
        atoms = self._atoms((matrix.shape[0], matrix.shape[1]))
        X, support, D = coded(matrix, weighting, self, atoms, self.nonzeros)
        codes = RowSparse(self.nonzeros).holding(support, X, dtype or matrix.dtype)
        return ProductMatrix(codes, Dense().fit(D, dtype=dtype or matrix.dtype), self)


def _codes_fit(form: Dictionary, shape: Shape) -> bool:
    return form.nonzeros <= shape[1]


def coded(
    matrix: Float[Tensor, "out in"], weighting: Weighting, form: Coded, atoms: int, nonzeros: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, k), their support and atoms (k, in) for one matrix, of balanced norms."""
    W = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    rows = gram_diagonal(weighting.left, W.shape[0]).to(W).sqrt()[:, None]
    rows = torch.where(rows > 0, rows, 1.0)
    settings = {name: getattr(form, name) for name in ("iterations", "power_steps", "seed")}
    X, support, D, _ = learn_dictionary(rows * weighting.right.times(W), atoms, nonzeros, **settings)
    near = weighting.right.over(D)
    D = weighted_lstsq_right(X, rows * W, Weighting(right=weighting.right), near, 1e-7).to(W)
    X, D = balance(X / rows, D)
    return X, support, D


def check_positive(value: int | None, name: str, word: str, *, optional: bool = False) -> None:
    if (value is None and optional) or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return
    raise ValueError(f"{word}({name}={value!r}): it is a positive integer")
