"""Sums of Kronecker products."""

from __future__ import annotations

from dataclasses import dataclass, replace

from eckart.forms.base import FORMS, Shape
from eckart.forms.tensor_train import Chain
from eckart.linalg.trains import Split, balanced


@FORMS.word("kronecker")
@dataclass(frozen=True)
class Kronecker(Chain):
    """W ≈ sum of A_t ⊗ B_t: the truncated SVD of the rearranged matrix (Van Loan and Pitsianis, 1993).

    The rows of the rearrangement are the places of an entry in A, its columns those in B, so that a Kronecker product
    is a matrix of rank one, and the sum is a chain of two cores: A is (1, a, b, terms), B (terms, c, d, 1).

    Args:
        terms: None is decided by the budget.
        left_shape: (a, b) of every A, which divides that of the matrix; empty chooses factors of similar size, filling
            up with zeros a side that has none.
    """

    terms: int | None = None
    left_shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.terms is not None and (not isinstance(self.terms, int) or self.terms < 1):
            raise ValueError(f"kronecker(terms={self.terms!r}): the number of terms is a positive integer")
        given = self.left_shape
        if given != () and not (isinstance(given, tuple) and len(given) == 2 and all(isinstance(n, int) and n > 0 for n in given)):  # fmt: skip # noqa: E501
            raise ValueError(f"kronecker(left_shape={given!r}): it is two positive integers")

    @property
    def width(self) -> int | None:
        return self.terms

    def at(self, width: int) -> Kronecker:
        return replace(self, terms=width)

    def split(self, shape: Shape) -> Split:
        if min(shape) < 1:
            raise ValueError(f"{self} does not fit a matrix of shape {shape}: an empty side has no factors")
        if not self.left_shape:
            out, in_ = (balanced(n, 2) for n in shape)
            return Split(shape, out, in_[::-1])
        (a, b), (m, n) = self.left_shape, shape
        if m % a or n % b:
            raise ValueError(f"{self} does not fit a matrix of shape {shape}: {a} x {b} does not divide it")
        return Split(shape, (a, m // a), (b, n // b))
