"""n of every m consecutive columns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from eckart.forms.base import FORMS, Form, Shape
from eckart.forms.patterns import OfEvery, Pattern
from eckart.forms.selections import Fisher, Selection
from eckart.forms.sparse import SparseForm


@FORMS.word("semi_sparse")
@dataclass(frozen=True)
class SemiSparse(SparseForm):
    """`n` entries of every `m` consecutive columns of a row (2:4 by default).

    Which ones is stored as the number of the choice among all C(m, n), in ceil(log2 C(m, n)) bits without gaps: 3 bits
    for 2:4, where two indices would take 4. The last group of a row, if it is shorter, keeps n of what there is.

    Args:
        n: entries kept; None is decided by the budget.
        m: columns in a group, at most 64.
        selection: which entries.
    """

    n: int | None = 2
    m: int = 4
    selection: Selection = field(default_factory=Fisher)

    def __post_init__(self) -> None:
        if not isinstance(self.m, int) or not 1 <= self.m <= 64:
            raise ValueError(f"semi_sparse(m={self.m!r}): a group has 1 to 64 columns")
        if self.n is not None and (not isinstance(self.n, int) or not 1 <= self.n <= self.m):
            raise ValueError(f"semi_sparse(n={self.n!r}, m={self.m}): 1 to {self.m} entries of a group are kept")
        self._check_selection()

    @property
    def open(self) -> bool:
        return self.n is None

    def ladder(self, shape: Shape) -> list[Form]:
        return [replace(self, n=n) for n in range(1, self.m)] if self.open else [self]

    def pattern(self, shape: Shape) -> Pattern:
        if self.n is None:
            raise ValueError(f"{self} has no n yet: give it, or a budget that decides it")
        return OfEvery(shape, n=self.n, m=self.m)
